"""Pictures are copied to the device as uint8, a quarter of their float32 size, and normalised there."""

import io
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.functional import pil_to_tensor

from minigpt4.common.rgb import open_image, to_rgb

Picture = Image.Image | torch.Tensor


def read_picture(content: bytes, vis_processor: Callable) -> Picture:
    """Decode a picture file for `to_sample`: to uint8 [3,H,W] if the processor takes it, otherwise to a PIL image.

    EXIF data and transparency are ignored. A picture of more than 64 million pixels raises
    Image.DecompressionBombError (see `open_image`). A file that is no picture, or is broken, may raise any kind of
    error: Pillow's plug-ins do.
    """
    image = open_image(io.BytesIO(content))
    if not takes_pixels(vis_processor):
        return to_rgb(image)
    if image.format == "JPEG" and image.mode == "RGB" and not image.decoderconfig:  # this one is not to be reduced
        with suppress(RuntimeError):  # Pillow reads or refuses the files that this decoder cannot read
            return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB)
    return pil_to_tensor(to_rgb(image))


def to_sample(vis_processor: Callable, picture: Picture) -> dict[str, Any]:
    """The part of a sample that holds a picture which `read_picture` decoded: `{"image": …}`.

    If the processor takes pixels, "image" is uint8 [3,S,S], with its companions "image_mean" and "image_std" [3].
    Otherwise "image" is the result of calling the processor.
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

    A subclass that inherits `pixels` is called instead: its `__call__` may change the picture in another way.
    """
    return "pixels" in vars(type(vis_processor))


def normalise(samples: dict[str, Any]) -> dict[str, Any]:
    """The batch with its uint8 images [B,3,H,W] as float32, normalised by "image_mean" and "image_std" [B,3].

    These two keys are removed. Any other batch is returned unchanged. The arithmetic is the same as in torchvision's
    ToTensor and Normalize, on the device of the images.
    """
    if "image_mean" not in samples or samples["image"].dtype != torch.uint8:
        return samples
    mean, std = (samples[key][:, :, None, None] for key in ("image_mean", "image_std"))
    image = samples["image"].float().div_(255).sub_(mean).div_(std)
    return {key: value for key, value in samples.items() if key not in ("image_mean", "image_std")} | {"image": image}
