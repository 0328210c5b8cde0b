"""Download a URL to a file: once per machine, resumed after an interruption, and checked."""

import contextlib
import hashlib
import logging
import os
import shutil
import ssl
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from minigpt4.common.errors import ConfigError

CHUNK = 1 << 20
# Seconds before each further attempt. An attempt that received a new byte starts the series again.
PAUSES = (1, 2, 5, 10, 20)
TIMEOUT = 60

# Errors after which another attempt may succeed; errors of the disk are not among them.
CONNECTION_ERRORS = (HTTPException, urllib.error.URLError, ConnectionError, TimeoutError, ssl.SSLError)


class DownloadError(ConfigError):
    """A file that could not be fetched, or has another size or hash than expected."""


def download(url: str, path: Path, kibibytes: int | None = None, sha256: str | None = None) -> None:
    """Fetch `url` to `path`, which appears complete or not at all. One process fetches; others for the path wait.

    An interrupted download leaves a file `.part`. This or a later run continues it if the server supports Range
    requests and still has the same file.

    Args:
        kibibytes: the known size of the file in KiB, to within 4.
        sha256: the file's hash, in hex.

    Raises:
        DownloadError: the server does not have the file, or keeps breaking off; size or hash is wrong; the disk is
            full.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        logging.info("Another process is fetching %s: waiting for it.", path.name)
        held = lock.acquire()
    with held:
        if path.exists():
            return
        logging.info("Fetching %s to %s", url, path)
        part = _fetch(url, path)
        _check(part, url, kibibytes, sha256)
        os.replace(part, path)


def _fetch(url: str, path: Path) -> Path:
    """Fetch the whole file. Returns its path, which still ends in `.part`."""
    failures = 0
    while True:
        part, before = None, -1
        try:
            with _open(url) as response:
                part = _part(path, response.headers)
                before = _size(part)
                _receive(url, response, part)
            return part
        except CONNECTION_ERRORS as error:
            status = getattr(error, "code", 500)  # an HTTPError has one
            if status < 500 and status != 429:
                raise DownloadError(f"{url}: the server answers {status} {error.reason}. {_by_hand(path)}") from None
            failures = 0 if part and _size(part) > before else failures + 1
            if failures > len(PAUSES):
                got = f" after {_size(part):,} bytes, which the next run goes on from" if part and _size(part) else ""
                raise DownloadError(f"{url} could not be fetched{got}: {error}. {_by_hand(path)}") from None
            logging.warning("Fetching %s broke off (%s): trying again.", path.name, error)
            time.sleep(PAUSES[max(failures - 1, 0)])


def _by_hand(path: Path) -> str:
    return f"Fetch it by other means and put it at {path}, or give the path of a copy in the config."


def _open(url: str, first_byte: int = 0):
    url = url.replace("https://huggingface.co", os.environ.get("HF_ENDPOINT") or "https://huggingface.co", 1)
    headers = {"User-Agent": "minigpt4", "Accept-Encoding": "identity"}
    if first_byte:
        headers["Range"] = f"bytes={first_byte}-"
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)


def _part(path: Path, headers) -> Path:
    """The partial file of this version of the file; another version on the server gets another one."""
    version = "".join(str(headers.get(name)) for name in ("ETag", "Last-Modified", "Content-Length"))
    return path.with_name(f"{path.name}.{hashlib.sha256(version.encode()).hexdigest()[:8]}.part")


def _receive(url: str, response, part: Path) -> None:
    """Append the missing bytes to `part`, from `response` or a ranged request.

    Raises ConnectionError if they end early.
    """
    length, have = response.headers["Content-Length"], _size(part)
    total = int(length) if length else None
    if have and have == total:
        return
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - have > free:
        raise DownloadError(
            f"{url} needs {(total - have) / 1e9:.1f} GB more, and {part.parent} has {free / 1e9:.1f} GB free. Make "
            "room, or set TORCH_HOME to a folder with more."
        )
    if total is not None and 0 < have < total:
        with _open(url, have) as ranged:
            if ranged.status == 206 and ranged.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
                logging.info("Going on after %s of %s bytes", f"{have:,}", f"{total:,}")
                return _append(ranged, part, have, total)
    part.unlink(missing_ok=True)
    return _append(response, part, 0, total)


def _append(response, part: Path, have: int, total: int | None) -> None:
    from tqdm import tqdm

    with open(part, "ab") as file:
        with tqdm.wrapattr(file, "write", total, initial=have, desc=part.name, disable=None) as shown:
            shutil.copyfileobj(response, shown, CHUNK)
    if total is not None and _size(part) < total:
        raise ConnectionError(f"the connection ended after {_size(part):,} of {total:,} bytes")


def _check(part: Path, url: str, kibibytes: int | None, sha256: str | None) -> None:
    """Raise DownloadError and remove the part if its size or hash is not the known one."""
    problem = size_problem(_size(part), kibibytes)
    if sha256 and not problem:
        problem = _hash_problem(part, sha256)
    if problem:
        part.unlink()
        raise DownloadError(f"{url} is not the file it should be: {problem}.")


def check_hash_once(path: Path, sha256: str) -> None:
    """Compare the hash of a cached file with `sha256`, in hex, unless that was done before.

    A file `.sha256` beside it records the comparison, with the file's size and time of change.
    Raises DownloadError if they differ; the file stays.
    """
    done, stat = path.with_name(f"{path.name}.sha256"), path.stat()
    record = f"{sha256.lower()} {stat.st_size} {stat.st_mtime_ns}\n"
    if done.is_file() and done.read_text(encoding="utf-8", errors="replace") == record:
        return
    problem = _hash_problem(path, sha256)
    if problem:
        raise DownloadError(
            f"{path} is not the file it should be: {problem}. Move it away to have it fetched, or correct the hash in "
            "the URL."
        )
    with contextlib.suppress(OSError):  # in a cache that others own, it is compared at every start
        done.write_text(record, encoding="utf-8")


def _hash_problem(path: Path, sha256: str) -> str | None:
    """How the hash of a file differs from `sha256`, in words; None: it does not."""
    with open(path, "rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    return None if actual == sha256.lower() else f"its sha256 is {actual}, not {sha256}"


def size_problem(size: int, kibibytes: int | None) -> str | None:
    """How `size` in bytes differs from the known size in KiB, in words; None: it does not, or no size is known."""
    if kibibytes is None or abs(size - kibibytes * 1024) <= 4096:
        return None
    kind = "truncated" if size < kibibytes * 1024 else "too long"
    return f"it is {kind}, with {size:,} bytes instead of about {kibibytes * 1024:,}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
