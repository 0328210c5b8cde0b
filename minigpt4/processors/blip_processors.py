"""The processors of BLIP and BLIP-2 (Li et al., 2022 and 2023), as LAVIS names them."""

import re
from collections.abc import Sequence

import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode
from torchvision.transforms.v2 import functional as F

from minigpt4.common import first_release
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.common.rgb import to_rgb
from minigpt4.processors.base_processor import BaseProcessor

__getattr__ = first_release.attributes_of(__name__)  # for names that are gone

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@registry.register_processor("blip_caption")
class BlipCaptionProcessor(BaseProcessor):
    """Caption → `prompt` + the caption in lower case, without `. ! " ( ) * # : ; ~`, at most `max_words` words."""

    def __init__(self, prompt: str = "", max_words: int = 50) -> None:
        if not isinstance(max_words, int) or max_words < 1:
            raise ConfigError(f"blip_caption: max_words={max_words!r} must be a whole number of at least 1.")
        self.prompt = prompt
        self.max_words = max_words

    def __call__(self, caption: str) -> str:
        caption = re.sub(r"[.!\"()*#:;~]", " ", caption.lower())
        caption = re.sub(r"\s{2,}", " ", caption).rstrip("\n").strip(" ")
        return self.prompt + " ".join(caption.split(" ")[: self.max_words])


class _Blip2ImageProcessor(BaseProcessor):
    """Resizes a picture of any size, in one of two ways.

    `__call__` takes a PIL image of any mode and returns float32 [3,S,S], resized by Pillow, scaled to [0, 1] and
    normalised, as in the first release. `pixels` takes uint8 [3,H,W] and returns uint8 [3,S,S], which is normalised on
    the device. Its resize is torch's antialiased bicubic, four times as fast. A value differs by at most 2 of 255
    levels, in photographs by less than 0.01 on average.
    """

    def __init__(self, resize: torch.nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ConfigError(
                f"mean={list(mean)} and std={list(std)} of a vis_processor must be three numbers each, red, green and "
                "blue, those of std more than 0."
            )
        self.mean, self.std = torch.tensor(list(mean)), torch.tensor(list(std))
        self.transform = transforms.Compose(
            [resize, transforms.ToTensor(), transforms.Normalize(list(mean), list(std))],
        )

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.transform(to_rgb(image))


def _checked_size(image_size: int) -> tuple[int, int]:
    if not isinstance(image_size, int) or image_size < 1:
        raise ConfigError(f"image_size={image_size!r} of a vis_processor must be a whole number of at least 1.")
    return image_size, image_size


@registry.register_processor("blip2_image_train")
class Blip2ImageTrainProcessor(_Blip2ImageProcessor):
    """A random crop of `min_scale` to `max_scale` of the area, resized (bicubic); no flip. → float32 [3, S, S].

    The crop is drawn from torch's global generator.
    """

    def __init__(
        self,
        image_size: int = 224,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        min_scale: float = 0.5,
        max_scale: float = 1.0,
    ) -> None:
        if not 0 < min_scale <= max_scale <= 1:
            raise ConfigError(
                f"blip2_image_train: 0 < min_scale <= max_scale <= 1 must hold; got {min_scale!r} and {max_scale!r}."
            )
        crop = transforms.RandomResizedCrop(
            _checked_size(image_size), scale=(min_scale, max_scale), interpolation=InterpolationMode.BICUBIC
        )
        super().__init__(crop, mean or CLIP_MEAN, std or CLIP_STD)

    def pixels(self, picture: torch.Tensor) -> torch.Tensor:
        crop = self.transform.transforms[0]
        box = crop.get_params(picture, crop.scale, crop.ratio)
        return F.resized_crop(picture, *box, list(crop.size), InterpolationMode.BICUBIC, antialias=True)


@registry.register_processor("blip2_image_eval")
class Blip2ImageEvalProcessor(_Blip2ImageProcessor):
    """The whole picture, resized (bicubic) without keeping its aspect ratio. → float32 [3, S, S]."""

    def __init__(
        self, image_size: int = 224, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> None:
        resize = transforms.Resize(_checked_size(image_size), interpolation=InterpolationMode.BICUBIC)
        super().__init__(resize, mean or CLIP_MEAN, std or CLIP_STD)

    def pixels(self, picture: torch.Tensor) -> torch.Tensor:
        size = list(self.transform.transforms[0].size)
        return F.resize(picture, size, InterpolationMode.BICUBIC, antialias=True)
