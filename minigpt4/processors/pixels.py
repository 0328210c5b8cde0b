"""Pictures travel to the device as uint8, a quarter of their float32 size, and are normalised there."""

import io
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.functional import pil_to_tensor

from minigpt4.processors.base_processor import to_rgb

Picture = Image.Image | torch.Tensor


def read_picture(content: bytes, vis_processor: Callable) -> Picture:
    """Decode a picture file for `to_sample`: to uint8 [3,H,W] where the processor takes it, otherwise for Pillow.

    Raises nearly any kind of error for what is no picture, or is broken: Pillow's plug-ins do. EXIF data do not matter.
    """
    image = Image.open(io.BytesIO(content))
    if not takes_pixels(vis_processor):
        return to_rgb(image)
    if image.format == "JPEG" and image.mode == "RGB":
        with suppress(RuntimeError):  # what this decoder cannot read, Pillow reads or refuses
            return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    return pil_to_tensor(to_rgb(image))


def to_sample(vis_processor: Callable, picture: Picture) -> dict[str, Any]:
    """What a sample holds of a picture that `read_picture` decoded: `{"image": …}`.

    From a processor that takes pixels, uint8 [3,S,S], with its "image_mean" and "image_std" [3] beside it; from any
    other, what calling it gives.
    """
    if not takes_pixels(vis_processor):
        return {"image": vis_processor(picture)}
    return {
        "image": vis_processor.pixels(picture),
        "image_mean": vis_processor.mean,
        "image_std": vis_processor.std,
    }


def takes_pixels(vis_processor: Callable) -> bool:
    """Whether the processor's own class defines `pixels`.

    A subclass that inherits it is called instead: it may change the picture in a way that `pixels` knows nothing of.
    """
    return "pixels" in vars(type(vis_processor))


def normalise(samples: dict[str, Any]) -> dict[str, Any]:
    """The batch with its uint8 images [B,3,H,W] as float32, normalised by "image_mean", "image_std" [B,3].

    Those two are taken out. Any other batch is returned as it is. The arithmetic is that of torchvision's ToTensor and
    Normalize, on the device where the images lie.
    """
    if "image_mean" not in samples or samples["image"].dtype != torch.uint8:
        return samples
    mean, std = (samples[key][:, :, None, None] for key in ("image_mean", "image_std"))
    image = samples["image"].float().div_(255).sub_(mean).div_(std)
    return {key: value for key, value in samples.items() if key not in ("image_mean", "image_std")} | {"image": image}
