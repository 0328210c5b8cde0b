"""Where weights come from: a local path, or a URL that is fetched once and cached under TORCH_HOME."""

import logging
import os
from pathlib import Path
from urllib.parse import urlparse

import torch

from minigpt4 import PACKAGE_ROOT
from minigpt4.common.errors import ConfigError

# Published weights of the vision encoders that `vit_model` names.
VIT_WEIGHTS = {
    "eva_clip_g": "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth",
    "eva_tiny": str(PACKAGE_ROOT / "assets" / "tiny" / "vision.safetensors"),
}


def vit_weights(vit_model, weights: str | None) -> str | None:
    """Resolve `model.vit_weights`: "published" stands for the weights of the named encoder.

    Raises ConfigError when `vit_model` is a mapping and no weights are given.
    """
    if weights != "published":
        return weights
    if not isinstance(vit_model, str):
        raise ConfigError(
            "model.vit_weights is required when model.vit_model is a mapping: no weights are published for it. "
            "Give a path, or null for random weights."
        )
    return VIT_WEIGHTS[vit_model]


def fetch(path_or_url: str) -> Path:
    """The local file of a path or URL; a URL is downloaded into TORCH_HOME/hub/checkpoints unless it lies there.

    Raises FileNotFoundError for a path that does not exist.
    """
    if "://" not in path_or_url:
        path = Path(path_or_url).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist.")
        return path
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    path = cache / os.path.basename(urlparse(path_or_url).path)
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        logging.info("Downloading %s to %s", path_or_url, path)
        torch.hub.download_url_to_file(path_or_url, str(path), progress=True)
    return path
