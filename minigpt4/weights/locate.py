"""Sources of weights: a local path, or a URL that is fetched once and cached under TORCH_HOME.

torch is not imported here, so that a config can be checked first.
"""

import hashlib
import json
import os
import pickle
import re
import zipfile
from pathlib import Path
from urllib.parse import urlparse

from safetensors import SafetensorError, safe_open

from minigpt4.common.errors import ConfigError
from minigpt4.common.facts import PUBLISHED_KIB, is_url, offline

# Weights of a folder in Hugging Face format: (index, the single file without index). safetensors are preferred.
HF_WEIGHTS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
# Bytes of a block of a large file; 64 of them identify it.
BLOCK = 1 << 20


def cached_file(url: str) -> Path:
    """The path of a URL's file in torch's cache of checkpoints, whether or not it was fetched.

    Published files have torch hub's path, so that files of torch and LAVIS are found. Any other URL has a folder of its
    own there: files of two URLs, or of two hashes, may have one name.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(os.environ.get("TORCH_HOME", os.path.join(cache, "torch"))).expanduser()
    folder, name = home / "hub" / "checkpoints", os.path.basename(urlparse(url).path)
    if url.partition("#")[0] in PUBLISHED_KIB:
        return folder / name
    return folder / hashlib.sha256(url.encode()).hexdigest()[:16] / (name or "weights")


def local_path(path_or_url: str) -> Path:
    """The file or folder of a path, or of a URL once it is fetched. It need not exist."""
    return cached_file(path_or_url) if is_url(path_or_url) else Path(path_or_url).expanduser()


def fetch(path_or_url: str) -> Path:
    """The local file or folder of a path or URL. A URL's file is fetched into the cache unless it is there.

    If the URL ends in `#sha256=…`, the hash is checked, also of a cached file, unless it was checked before.

    Raises:
        FileNotFoundError: a path does not exist.
        DownloadError: a URL cannot be fetched, gives a wrong file, or may not be fetched because of `offline()`.
    """
    path = local_path(path_or_url)
    if not is_url(path_or_url):
        if path.exists():
            return path
        raise FileNotFoundError(f"{path} does not exist.")
    from minigpt4.weights.download import DownloadError, check_hash_once, download

    url, _, fragment = path_or_url.partition("#")
    if fragment and not re.fullmatch(r"sha256=[0-9a-fA-F]{64}", fragment):
        raise ConfigError(f"{path_or_url}: #{fragment} must be #sha256= and 64 hexadecimal digits.")
    sha256 = fragment.removeprefix("sha256=").lower() or None
    if path.exists():
        if sha256:
            check_hash_once(path, sha256)
        return path
    if offline() and not url.startswith("file:"):
        raise DownloadError(
            f"{path.name} is not in the cache, and nothing may be fetched (--offline or HF_HUB_OFFLINE). Put the file "
            f"of {url} at {path}, or give the path of a copy in the config."
        )
    download(url, path, PUBLISHED_KIB.get(url), sha256)
    return path


def shards(folder: Path) -> dict[str, list[str]]:
    """The weight files of a folder in Hugging Face format by its index: {file name: names of its tensors}.

    Without an index, the single file has an empty list. Without weights, the result is empty. Files of an index may be
    missing.

    Raises ConfigError for an index that cannot be read.
    """
    for index, single in HF_WEIGHTS:
        if (folder / index).is_file():
            try:
                weight_map = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError, TypeError) as error:
                raise ConfigError(f"{folder / index} is no index of shards: {error!r}. Fetch it again.") from None
            files: dict[str, list[str]] = {}
            for name, file in weight_map.items():
                files.setdefault(file, []).append(name)
            return files
        if (folder / single).is_file():
            return {single: []}
    return {}


def missing_shards(folder: Path) -> list[str]:
    """Names of the weight files that a folder's index lists and the folder lacks."""
    return sorted(name for name in shards(folder) if not (folder / name).is_file())


def why_unreadable(path: Path) -> str | None:
    """The likely reason why weights or a shard cannot be read, by the first bytes and the size; None: unknown."""
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git-LFS pointer, not the file itself; run `git lfs pull` in its folder"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page, not the file itself; fetch it again"
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        return "it is compressed by zstd, which is not read; unpack it: zstd -d FILE"
    from minigpt4.weights.download import size_problem

    by_name = {cached_file(url).name: kibibytes for url, kibibytes in PUBLISHED_KIB.items()}
    problem = size_problem(path.stat().st_size, by_name.get(path.name))
    return f"{problem}; fetch it again" if problem else None


def broken_header(path: Path) -> str | None:
    """Why a weights file is broken, as far as that shows without torch and without reading all of it. None: it may be
    whole.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "np"):
                return None
        except SafetensorError as problem:
            return why_unreadable(path) or f"it is cut off, or no safetensors file ({problem})"
    with open(path, "rb") as file:
        is_pickle = file.read(1) == pickle.PROTO
    return None if is_pickle or zipfile.is_zipfile(path) else why_unreadable(path)


def identity(path_or_url: str) -> dict[str, str | int]:
    """Identifies weights by file name and, if the file is on this machine, size and digest. Nothing is downloaded.

    A URL other than a published one is part of the identity: files of one name may differ.
    The digest covers the whole file, or 64 blocks of 1 MB spread over a larger one; of a folder, all its weight files.
    """
    path = local_path(path_or_url)
    files = [path] if path.is_file() else sorted(path / name for name in shards(path)) if path.is_dir() else []
    url = path_or_url.partition("#")[0]
    named = {"file": path.name} | ({"url": url} if is_url(url) and url not in PUBLISHED_KIB else {})
    if not files:
        return named
    digest = hashlib.sha256()
    for file in files:
        _add_blocks(digest, file)
    size = sum(file.stat().st_size for file in files)
    return named | {"bytes": size, "sha256": digest.hexdigest()}


def _add_blocks(digest, path: Path) -> None:
    size = path.stat().st_size
    starts = range(0, size, BLOCK) if size <= 64 * BLOCK else (i * (size - BLOCK) // 63 for i in range(64))
    with open(path, "rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(BLOCK))
