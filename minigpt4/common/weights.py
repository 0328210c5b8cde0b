"""Where weights come from: a local path, or a URL that is fetched once and cached under TORCH_HOME."""

import hashlib
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
    path = local_path(path_or_url)
    if "://" not in path_or_url and not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        logging.info("Downloading %s to %s", path_or_url, path)
        torch.hub.download_url_to_file(path_or_url, str(path), progress=True)
    return path


def local_path(path_or_url: str) -> Path:
    """Where the file of a path or URL is, or would be once it is downloaded."""
    if "://" not in path_or_url:
        return Path(path_or_url).expanduser()
    return Path(torch.hub.get_dir()) / "checkpoints" / os.path.basename(urlparse(path_or_url).path)


def identity(path_or_url: str) -> dict[str, str | int]:
    """What tells a weights file from another: its name and, where it lies here, its size and a digest.

    The digest is of the whole file, of 64 pieces of 1 MB spread over one that is larger. Nothing is downloaded.
    """
    path = local_path(path_or_url)
    if not path.is_file():
        return {"file": path.name}
    size, piece = path.stat().st_size, 1 << 20
    starts = range(0, size, piece) if size <= 64 * piece else (i * (size - piece) // 63 for i in range(64))
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(piece))
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}
