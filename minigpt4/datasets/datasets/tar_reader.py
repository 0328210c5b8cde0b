"""Reads samples from a tar in one pass: plain or compressed, whatever lies between their members, in any order.

A sample is the members with the same name up to the suffix: `0001.jpg` and `0001.txt`, or `a 2.0.jpg` and `a 2.0.txt`.
A text may have several pictures: `0001.0.jpg` and `0001.1.jpg`.
"""

import bz2
import gzip
import io
import lzma
import os
import re
import tarfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from minigpt4.datasets.captions import Incomplete, Unusable
from minigpt4.datasets.patience import OutOfReach

Sample = TypeVar("Sample")

TEXT_SUFFIXES = ("json", "txt")
UNPACKERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
BUFFER = 1 << 18
BLOCK = tarfile.BLOCKSIZE
# Records about the next member that change nothing here.
TIMES = re.compile(rb"(\d+ [acm]time=[\d.]+\n)+\0*")
# A hidden member. With one before it, a broken header is the end of the tar for tarfile, as after any other.
NO_MEMBER = tarfile.TarInfo("._").tobuf()
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
    final: bool = False
    """Whether no further member is waited for."""

    def __str__(self) -> str:
        return f"{self.key} has {', '.join('.' + suffix for suffix in self.suffixes) or 'no members'}"

    @property
    def has_text(self) -> bool:
        return any(suffix in self.files for suffix in TEXT_SUFFIXES)

    def join(self, other: "Group") -> None:
        """Take the members of another group, `<key>` or `<key>.0`; those of the latter as `0.jpg`."""
        number = other.key[len(self.key) + 1 :]
        prefix = f"{number}." if number else ""
        self.files |= {prefix + suffix: content for suffix, content in other.files.items()}
        self.suffixes += [prefix + suffix for suffix in other.suffixes]
        self.size += other.size


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


def member_id(shard: str, key: str) -> str:
    """The id of a sample that has none of its own."""
    return f"{os.path.basename(shard)}/{key}"


def read_members(raw: io.RawIOBase, pictures: Collection[str]) -> Iterator[Member]:
    """The files in a tar, in order. Content is read of texts and of the suffixes in `pictures`.

    Raises ShardError, once: for what is no tar, at the place where it is broken, or at its end if that is missing.
    """
    wanted, first, start = {*pictures, *TEXT_SUFFIXES}, True, b""
    try:
        file = _unpacked(raw)
        # tarfile needs five times as long for a member. So it gets the rest of a tar from the first unusual one on.
        while plain := _plain_header(header := file.read(BLOCK)):
            name, size, is_file = plain
            padded = size + -size % BLOCK
            if not is_file:
                header += file.read(padded)
                if TIMES.fullmatch(header, BLOCK):
                    continue
                break
            first, start = False, NO_MEMBER
            key, suffix = split_name(name, pictures)
            content = file.read(padded) if suffix in wanted else None
            if content is not None and len(content) < size:
                raise EOFError("unexpected end of data")
            if not is_hidden(name):
                yield key, suffix, content and content[:size], BLOCK + padded
            if content is None:
                _pass_over(file, padded)
        with tarfile.open(fileobj=_Chained(start + header, file), mode="r|", encoding="utf-8") as tar:
            first = False
            yield from _members_of(tar, wanted, pictures)
            _check_end(tar)
    except OutOfReach as error:
        raise ShardError(UNREADABLE, str(error)) from error
    except ShardError:
        raise
    except Exception as error:  # tarfile and the unpackers raise nearly every kind of error on broken files
        cut_off = isinstance(error, EOFError) or "unexpected end" in str(error)
        cause = UNREADABLE if first else CUT_OFF if cut_off else CORRUPT
        raise ShardError(cause, f"{type(error).__name__}: {error}") from error


def _plain_header(header: bytes) -> tuple[str, int, bool] | None:
    """(name, bytes, whether it is a file) of the header of a file, or of records about the next one. None: of another
    kind, or broken.
    """
    kind = header[156:157]
    if len(header) < BLOCK or kind not in (b"0", b"x") or header[257:262] != b"ustar":
        return None
    try:
        size, checksum = int(header[124:136].strip(b" \0"), 8), int(header[148:156].strip(b" \0"), 8)
    except ValueError:  # such as a number in binary
        return None
    if size < 0 or sum(header) - sum(header[148:156]) + 8 * ord(" ") != checksum:
        return None
    name, folder = (
        part.partition(b"\0")[0].decode("utf-8", "surrogateescape") for part in (header[:100], header[345:500])
    )
    return f"{folder}/{name}" if folder else name, size, kind == b"0"


def _pass_over(file: io.BufferedIOBase, size: int) -> None:
    """Read bytes without keeping them. Raises EOFError if there are fewer."""
    while size:
        read = len(file.read(min(size, BUFFER)))
        if not read:
            raise EOFError("unexpected end of data")
        size -= read


class _Chained:
    """Bytes, and after them a file."""

    def __init__(self, start: bytes, file: io.BufferedIOBase) -> None:
        self._start, self._file = start, file

    def read(self, size: int) -> bytes:
        start, self._start = self._start[:size], self._start[size:]
        return start or self._file.read(size)


def _members_of(tar: tarfile.TarFile, wanted: Collection[str], pictures: Collection[str]) -> Iterator[Member]:
    for info in tar:
        tar.members = []  # or it would keep them all
        if is_hidden(info.name):
            continue
        key, suffix = split_name(info.name, pictures)
        if info.islnk() or info.issym():
            yield key, f"{suffix} (a link)", None, BLOCK  # its file may have been anywhere before
        elif info.isreg():
            content = tar.extractfile(info).read() if suffix in wanted else None
            yield key, suffix, content, BLOCK + info.size + -info.size % BLOCK


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
    members: Iterable[Member],
    make: Callable[[Group], Sample],
    drop: Callable[[str, str], None],
    several_pictures: bool = False,
) -> Iterator[Sample]:
    """The samples that `make` makes of members with the same key, each once it is complete.

    several_pictures: whether the pictures `a.0.jpg` and `a.1.jpg` belong to the text `a.json`.
    make: raises Incomplete for members whose sample may still be completed by later ones, Unusable for others.
    drop: is called with the cause and the members that make no sample, also for a tar without any.
    Raises the ShardError of `members` after all samples up to there.
    """
    grouping, problem = _Grouping(make, drop, several_pictures), None
    try:
        for member in members:
            if not grouping.fits(member):
                yield from grouping.end_run()
            grouping.add(member)
    except ShardError as error:
        problem = error
    last = list(grouping.run)
    yield from grouping.end_run()
    for key in last if problem else ():
        grouping.take(key)  # the rest of it is what is missing
    yield from grouping.end()
    if problem:
        raise problem
    if grouping.is_empty:
        drop("a shard without samples", str(grouping.last))


class _Grouping(Generic[Sample]):
    """Joins the members of a tar to samples.

    A run is members in a row whose names begin alike, such as those of one sample. Groups that make no sample at the
    end of their run wait for later members: for those of their own name, and at the end of the tar for pictures.
    """

    def __init__(
        self, make: Callable[[Group], Sample], drop: Callable[[str, str], None], several_pictures: bool
    ) -> None:
        self._make, self._drop, self._several_pictures = make, drop, several_pictures
        self.run: dict[str, Group] = {}
        self.last = Group("it")
        self.is_empty = True
        self._scope, self._has_text, self._run_size = "", False, 0
        self._waiting: dict[str, Group] = {}
        self._held = 0  # bytes that wait
        self._beside: dict[str, list[str]] = {}  # {"a": ["a.0", "a.1"]}: pictures that wait
        self._made: set[str] = set()
        self._lost: set[str] = set()  # keys of texts whose pictures may have been given up
        self._gives_up, self._distance = False, ""

    def fits(self, member: Member) -> bool:
        """Whether a member belongs to the run. A second picture or text of one name begins another run."""
        key, suffix, content, _ = member
        group = self.run.get(key)
        if group is not None:
            return content is None or suffix not in group.files
        if not (self.run and self._several_pictures and self._run_size <= MAX_WAITING):
            return not self.run
        return _begins(key, self._scope) or _begins(self._scope, key)

    def add(self, member: Member) -> None:
        """Take a member into the run."""
        key, suffix, content, size = member
        group = self.run.get(key)
        if group is None:
            if not self.run:
                self._scope, self._has_text, self._run_size = _beginnings(key)[-1], False, 0
            self.last = group = self.run[key] = Group(key)
        group.suffixes.append(suffix)
        group.size += size
        self._run_size += size
        if content is not None:
            group.files[suffix] = content
            if suffix in TEXT_SUFFIXES and not (self._has_text and len(self._scope) <= len(key)):
                self._scope, self._has_text = key, True  # the shortest

    def end_run(self) -> Iterator[Sample]:
        """The samples of the run, which ends."""
        groups = [group for group in self.run.values() if group.files]
        self.run = {}
        pictures: dict[str, list[Group]] = {}
        if len(groups) > 1:
            texts = {group.key for group in groups if group.has_text}
            for group in groups:
                owner = next((key for key in _beginnings(group.key) if key in texts), group.key)
                pictures.setdefault(owner, []).extend([group] if group.key != owner else [])
            groups = [group for group in groups if group.key in pictures]
        for group in groups:
            yield from self._settle(group, pictures.get(group.key, ()))
        if self._held > MAX_WAITING:
            self._gives_up, self._distance = True, f" within {MAX_WAITING >> 20} MB of it in the tar"
            while self._held > MAX_WAITING:
                yield from self._give_up(next(iter(self._waiting)), final=False)
            self._gives_up, self._distance = False, ""

    def end(self) -> Iterator[Sample]:
        """The samples of what waits at the end of the tar."""
        self._gives_up = True
        for key in list(self._waiting):
            yield from self._give_up(key, final=True)

    def take(self, key: str) -> Group | None:
        """The waiting group of a key, which waits no longer."""
        group = self._waiting.pop(key, None)
        self._held -= group.size if group else 0
        return group

    def _settle(self, group: Group, pictures: Sequence[Group]) -> Iterator[Sample]:
        """The sample of a group with its pictures. If it is incomplete, they wait one by one."""
        self.is_empty = False
        if group.key in self._waiting:
            earlier = self.take(group.key)
            if earlier.files.keys() & group.files.keys():
                self._lose(earlier)
            else:
                group.join(earlier)
        whole = group
        if pictures:
            whole = Group(group.key, final=group.final)
            for part in (group, *pictures):
                whole.join(part)
        try:
            sample = self._make(whole)
        except Incomplete as cause:
            group.cause = str(cause)
            self._wait(group)
            for picture in pictures:
                yield from self._settle(picture, [])
        except Unusable as cause:
            # At the end of the tar, the .txt of a sample that was made of its picture and .json is no loss.
            if not (group.final and self._is_made(group)):
                self._drop(str(cause), f"{group.key}: {cause.__cause__}" if cause.__cause__ else str(whole))
        else:
            self._made.add(group.key)
            yield sample

    def _wait(self, group: Group) -> None:
        if self._gives_up:
            self._lose(group)
            return
        self._waiting[group.key] = group
        self._held += group.size
        for key in [] if group.has_text else _beginnings(group.key)[1:]:
            self._beside.setdefault(key, []).append(group.key)

    def _give_up(self, key: str, final: bool) -> Iterator[Sample]:
        """Make the sample that a group which waits belongs to, or drop it. final: nothing that it lacks can follow."""
        owner = self._owner(key) or key
        beside = [each for each in self._beside.pop(owner, []) if each in self._waiting and self._owner(each) == owner]
        groups = [group for group in map(self.take, (owner, *beside)) if group]
        for group in groups:
            group.final = final and owner not in self._lost
        if groups:
            yield from self._settle(groups[0], groups[1:])

    def _owner(self, key: str) -> str | None:
        """The key of the text that waits and that a group belongs to: the longest that its own begins with."""
        return next((each for each in _beginnings(key) if each in self._waiting and self._waiting[each].has_text), None)

    def _lose(self, group: Group) -> None:
        self._lost.update(_beginnings(group.key))
        if not self._is_made(group):
            self._drop(group.cause + self._distance, str(group))

    def _is_made(self, group: Group) -> bool:
        """Whether a sample of these members was made.

        Beside a sample `1.jpg`, `1.txt` there may be others of its files: `1.meta.json`, or `1.json` after all texts.
        """
        return not self._made.isdisjoint(_beginnings(group.key))


def _begins(key: str, beginning: str) -> bool:
    return key == beginning or key.startswith(beginning + ".")


def _beginnings(key: str) -> list[str]:
    """A key and what precedes each dot in its file's name: ["a/b.1.2", "a/b.1", "a/b"]."""
    found, (folder, slash, file) = [key], key.rpartition("/")
    while "." in file:
        file = file.rpartition(".")[0]
        found.append(folder + slash + file)
    return found
