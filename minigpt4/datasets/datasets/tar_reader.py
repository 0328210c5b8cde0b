"""Reads samples from a tar in one pass: plain or compressed, whatever lies between their members, in any order.

A sample is the members with the same name up to the suffix: `0001.jpg` and `0001.txt`, or `a 2.0.jpg` and `a 2.0.txt`.
"""

import bz2
import gzip
import io
import lzma
import os
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from minigpt4.datasets.captions import Incomplete, Unusable
from minigpt4.datasets.patience import OutOfReach

Sample = TypeVar("Sample")

TEXT_SUFFIXES = ("json", "txt")
UNPACKERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
BUFFER = 1 << 18
BLOCK = tarfile.BLOCKSIZE
# Bytes of incomplete samples that wait for their other members. The oldest are given up beyond that.
MAX_WAITING = 256 << 20

UNREADABLE = "a shard, or a part of it, that cannot be read"
CORRUPT = "the rest of a corrupt tar"
CUT_OFF = "the rest of a tar that was cut off"
JOINED = "the rest of a file of several tars (joined by cat), of which only the first is read"


class ShardError(Exception):
    """A shard, or the rest of one, cannot be read."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause)
        self.cause, self.detail = cause, detail


Member = tuple[str, str, bytes | None, int]
"""A file in a tar: its name without the suffix, the suffix in lower case, its content (None: not asked for), and the
bytes that it takes in the tar."""


@dataclass
class Group:
    """The members of a tar with one key, the name without the suffix."""

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    """{suffix: content} of those that were asked for."""
    suffixes: list[str] = field(default_factory=list)
    """Of all."""
    size: int = 0
    """Bytes that they take in the tar."""
    cause: str = ""
    """Why they make no sample."""

    def __str__(self) -> str:
        return f"{self.key} has {', '.join('.' + suffix for suffix in self.suffixes)}"


def is_hidden(name: str) -> bool:
    """Whether a path in a tar is none of its maker's files: `._0001.jpg` and `__MACOSX/` of a Mac, dot files.

    A folder may begin with a dot.
    """
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    return (
        parts[-1:]
        and parts[-1].startswith(".")
        or "__MACOSX" in parts
        or (
            len(parts) == 1 and parts[0].startswith("__") and parts[0].endswith("__")  # webdataset's own
        )
    )


def split_name(name: str, pictures: Collection[str]) -> tuple[str, str]:
    """(key, suffix) of a path. The text of `a.jpg` may also be called `a.jpg.txt`."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.rpartition(".")
    stem, suffix = (stem, suffix.lower()) if dot else (file, "")
    if suffix in TEXT_SUFFIXES and "." in stem:
        first, _, second = stem.rpartition(".")
        stem = first if second.lower() in pictures else stem
    return folder + slash + stem, suffix


def read_members(raw: io.RawIOBase, pictures: Collection[str]) -> Iterator[Member]:
    """The files in a tar, in order. Content is read of texts and of the suffixes in `pictures`.

    Raises ShardError, once: for what is no tar, at the place where it is broken, or at its end if that is missing.
    """
    wanted, first = {*pictures, *TEXT_SUFFIXES}, True
    try:
        with tarfile.open(fileobj=_unpacked(raw), mode="r|") as tar:
            first = False
            for info in tar:
                tar.members = []  # or it would keep them all
                if info.isreg() and not is_hidden(info.name):
                    key, suffix = split_name(info.name, pictures)
                    content = tar.extractfile(info).read() if suffix in wanted else None
                    yield key, suffix, content, BLOCK + info.size + -info.size % BLOCK
            _check_end(tar)
    except OutOfReach as error:
        raise ShardError(UNREADABLE, str(error)) from error
    except ShardError:
        raise
    except Exception as error:  # tarfile and the unpackers raise nearly every kind of error on broken files
        cut_off = isinstance(error, EOFError) or "unexpected end" in str(error)
        cause = UNREADABLE if first else CUT_OFF if cut_off else CORRUPT
        raise ShardError(cause, f"{type(error).__name__}: {error}") from error


def _unpacked(raw: io.RawIOBase) -> io.BufferedIOBase:
    file = io.BufferedReader(raw, BUFFER)
    unpack = unpacker(file.peek(8))
    return unpack(file) if unpack else file


def unpacker(head: bytes) -> Callable | None:
    """The function that opens a compressed file which begins like this; None: it is not compressed."""
    return next((unpack for magic, unpack in UNPACKERS.items() if head.startswith(magic)), None)


def _check_end(tar: tarfile.TarFile) -> None:
    """Raise ShardError unless two blocks of zeros follow, and nothing else.

    tarfile takes a broken header for the end.
    """
    while rest := tar.fileobj.read(1 << 20):
        if rest.strip(b"\0"):
            is_tar = rest.lstrip(b"\0")[257:262] == b"ustar"
            raise ShardError(JOINED if is_tar else CORRUPT)
    if tar.fileobj.tell() - tar.offset < 2 * BLOCK:
        raise ShardError(CUT_OFF)


def read_samples(
    members: Iterable[Member], make: Callable[[Group], Sample], drop: Callable[[str, Group], None]
) -> Iterator[Sample]:
    """The samples that `make` makes of members with the same key, each once it is complete.

    make: raises Incomplete for members whose sample may still be completed by later ones, Unusable for others.
    drop: is called with the cause and the members that make no sample, also for a tar without any.
    Raises the ShardError of `members` after all samples up to there.
    """
    waiting: dict[str, Group] = {}
    made: set[str] = set()
    held, dropped, current, problem = 0, False, Group("it"), None

    def settle(group: Group) -> Iterator[Sample]:
        nonlocal held, dropped
        try:
            sample = make(group)
        except Incomplete as cause:
            group.cause = str(cause)
            waiting[group.key] = group
            held += group.size
        except Unusable as cause:
            drop(str(cause), group)
            dropped = True
        else:
            made.add(group.key)
            yield sample

    def is_lost(group: Group) -> bool:
        # Beside a sample `1.jpg`, `1.txt` there may be others of its files: `1.meta.json`, or `1.json` after all texts.
        return group.key not in made and os.path.splitext(group.key)[0] not in made

    try:
        for key, suffix, content, size in members:
            # A second picture or text of one name begins another sample of that name.
            if key != current.key or (content is not None and suffix in current.files):
                if current.files:
                    yield from settle(current)
                while held > MAX_WAITING:
                    oldest = waiting.pop(next(iter(waiting)))
                    held -= oldest.size
                    if is_lost(oldest):
                        drop(f"{oldest.cause} within {MAX_WAITING >> 20} MB of it in the tar", oldest)
                    dropped = True
                current = waiting.pop(key, None) or Group(key)
                held -= current.size
            current.suffixes.append(suffix)
            current.size += size
            if content is not None:
                current.files[suffix] = content
    except ShardError as error:
        problem = error
    if current.files:
        yield from settle(current)
    if problem:
        waiting.pop(current.key, None)  # the rest of it is what is missing
    for group in filter(is_lost, waiting.values()):
        drop(group.cause, group)
    if problem:
        raise problem
    if not (made or waiting or dropped):
        drop("a shard without samples", current)
