"""A cache of image features: the output of the vision side for each picture of a dataset, computed once.

    <folder>/cache.json     the manifest: source of the features, dataset, their shape [Q,W], the number of shards
    <folder>/00000.tar …    webdataset shards: <key>.npy, float16 [Q,W], and <key>.json {"caption", "image_id"}; of a
                            stream also "identity"

`python -m minigpt4 cache-features` writes it; `build_info.features: <folder>` trains from it.
"""

import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds

from minigpt4.common.errors import ConfigError
from minigpt4.common.output import own_folder, write_whole

MANIFEST = "cache.json"
IDENTITIES = "identities"
"""In the manifest: whether each sample has an "identity", by which a share is drawn (`datasets.splits`)."""


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a cache. Raises ConfigError for a folder that is no cache."""
    path = Path(folder).expanduser() / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if {"made_by", "shape", "parts"} <= manifest.keys():
            return manifest
    except (OSError, ValueError, AttributeError):
        pass
    raise ConfigError(f"{path} is not the manifest of a feature cache. Make one: python -m minigpt4 cache-features")


def open_cache(folder: str | Path, manifest: dict[str, Any]) -> None:
    """Begin a cache, or continue the one in the folder. Raises ConfigError if that has another manifest or other files.

    Several processes may do so at once: all write the same content.
    """
    folder = Path(folder)
    own_folder(folder, MANIFEST)
    path = folder / MANIFEST
    if path.exists():
        found = read_manifest(folder)
        earlier = {"content", IDENTITIES} - found.keys()  # not in caches of earlier versions
        manifest = {key: value for key, value in manifest.items() if key not in earlier}
        check_same(found, manifest, f"{folder} holds a cache that differs from the one asked for")
        return
    write_whole(path, json.dumps(manifest, indent=2))


def shards_of(folder: str | Path) -> list[Path]:
    """All shards of a cache, in order. Raises ConfigError if some are missing."""
    folder = Path(folder).expanduser()
    paths = [shard_path(folder, number) for number in range(read_manifest(folder)["parts"])]
    present = set(os.listdir(folder))
    missing = [path for path in paths if path.name not in present]
    if missing:
        raise ConfigError(
            f"The feature cache {folder} is not complete: {len(missing)} of {len(paths)} shards are missing, e.g. "
            f"{missing[0].name}. Run the same cache-features command again; it goes on where it stopped."
        )
    return paths


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.tar"


def write_shard(path: Path, samples: Iterable[tuple[str, np.ndarray, dict[str, str]]]) -> int:
    """Write (key, features float16 [Q,W], {"caption", "image_id"}), the whole shard or nothing. Returns the number."""
    count = 0
    part = path.with_name(f".{path.name}.part")
    try:
        with open(part, "wb") as file, wds.TarWriter(file, mtime=0) as tar:
            for key, features, text in samples:
                content = io.BytesIO()
                np.save(content, features)
                tar.write({"__key__": key, "npy": content.getvalue(), "json": json.dumps(text).encode()})
                count += 1
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return count


def read_features(content: bytes, shape: list[int]) -> torch.Tensor:
    """The content of an .npy as float16 [Q,W]. Raises ValueError for another shape or type, NaN, and a broken file."""
    features = np.load(io.BytesIO(content), allow_pickle=False)
    if features.dtype != np.float16 or list(features.shape) != list(shape):
        raise ValueError(f"{features.dtype} {features.shape} instead of float16 {tuple(shape)}")
    if not np.isfinite(features).all():
        raise ValueError("NaN or infinity among the features")
    return torch.from_numpy(features)


def check_same(found: Mapping[str, Any], expected: Mapping[str, Any], message: str) -> None:
    """Raise ConfigError that lists the differences of two nested mappings, if there are any."""
    differences = list(_differences(found, expected))
    if differences:
        raise ConfigError(f"{message}:\n  " + "\n  ".join(differences))


def _differences(found: Any, expected: Any, key: str = "") -> Iterable[str]:
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        if "file" in found and "file" in expected:
            # A weights file, identified by its content, or by URL or name if one of the two files is not here.
            by = next((key for key in ("sha256", "url") if key in found and key in expected), "file")
            if found[by] != expected[by]:
                yield f"{key}: {found['file']} in the cache, {expected['file']} here, which differ in {by}"
            return
        for name in sorted(found.keys() | expected.keys()):
            yield from _differences(found.get(name), expected.get(name), f"{key}.{name}" if key else name)
    elif found != expected:
        yield f"{key}: {found!r} in the cache, {expected!r} here"
