"""Pictures travel to the device as uint8, a quarter of their float32 size, and are normalised there."""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image


def to_sample(vis_processor: Callable[[Image.Image], Any], picture: Image.Image) -> dict[str, Any]:
    """What a sample holds of a picture: `{"image": …}`.

    From a processor whose own class defines `pixels`, uint8 [3,S,S], with its "image_mean" and "image_std" [3] beside
    it; from any other, what calling it gives. A subclass that inherits `pixels` is called: it may change the picture in
    a way that `pixels` knows nothing of.
    """
    if "pixels" not in vars(type(vis_processor)):
        return {"image": vis_processor(picture)}
    return {
        "image": vis_processor.pixels(picture),
        "image_mean": vis_processor.mean,
        "image_std": vis_processor.std,
    }


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
