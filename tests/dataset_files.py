"""Writes small shards and folders for tests."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

VIS = {"train": {"name": "blip2_image_train", "image_size": 16}}
TEXT = {"train": {"name": "blip_caption"}}


def picture_bytes(seed: int, size: int = 20, format: str = "PNG") -> bytes:
    """A smooth random picture as a file's content."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(buffer, format)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar with these (name, content)."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def good_members(first: int, count: int, suffix: str = "png") -> list[tuple[str, bytes]]:
    """Samples as img2dataset writes them: picture, .json with the caption, .txt; captions "Sample <number>."."""
    members = []
    for i in range(first, first + count):
        caption = f"Sample {i}."
        members += [
            (f"{i:09d}.{suffix}", picture_bytes(i, format="PNG" if suffix == "png" else "JPEG")),
            (f"{i:09d}.json", json.dumps({"caption": caption, "status": "success"}).encode()),
            (f"{i:09d}.txt", caption.encode()),
        ]
    return members


def write_shards(folder: Path, count: int = 4, samples: int = 30) -> Path:
    """00000.tar … in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(count):
        write_tar(folder / f"{shard:05d}.tar", good_members(shard * samples, samples))
    return folder


def write_align(folder: Path, records: int = 12, suffix: str = ".jpg") -> Path:
    """A cc_sbu_align folder; captions "Caption Number <i>!"."""
    (folder / "image").mkdir(parents=True, exist_ok=True)
    annotations = [{"image_id": str(i), "caption": f"Caption Number {i}!"} for i in range(records)]
    (folder / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))
    for i in range(records):
        (folder / "image" / f"{i}{suffix}").write_bytes(picture_bytes(i, format="JPEG"))
    return folder
