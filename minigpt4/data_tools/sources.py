"""Datasets as records and faults, which are read part by part.

A caption is a conversation of a picture and an answer, so that one form stands for all.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from minigpt4.common.errors import ConfigError
from minigpt4.datasets.captions import Unusable, usable
from minigpt4.datasets.conversations.formats import Part, Records
from minigpt4.datasets.conversations.listed import ListedRecords
from minigpt4.datasets.conversations.parquet import ParquetRows
from minigpt4.datasets.conversations.record import Message, Picture, Record
from minigpt4.datasets.conversations.stream import ConversationStream, RawRecord
from minigpt4.datasets.conversations.text_files import shown
from minigpt4.datasets.datasets.cc_sbu_dataset import SUFFIXES, list_pictures, load_annotations
from minigpt4.datasets.datasets.image_text_stream import ImageTextStream
from minigpt4.datasets.datasets.shards import is_local
from minigpt4.datasets.datasets.tar_reader import CORRUPT, CUT_OFF, JOINED, UNREADABLE
from minigpt4.datasets.left_out import Gate

# Records of a file that a worker reads at a time.
PART = 1000
SHARD_CAUSES, EMPTY = (UNREADABLE, CORRUPT, CUT_OFF, JOINED), "a shard without samples"
MISTAKE = "a record with a mistake"
ALIGN_FILE = "filter_cap.json"


class Fault(NamedTuple):
    """Something that keeps a record, or a part of a shard, from being trained on."""

    where: str
    what: str
    kind: str = "mistake"
    """A key of `findings.KINDS`."""
    record: Record | None = None
    """What there is of a record: a picture without text, which is looked at all the same."""


class Source(Protocol):
    """A dataset, or a split of one."""

    name: str
    where: str
    """Its files, for people."""
    num_parts: int
    shards: list[str]
    """Empty: the dataset is none of shards."""
    folders: list[str]
    """Absolute paths of folders of which every picture is a record."""
    text_processor: Callable[[str], str] | None
    """Changes the captions in training."""

    def read(self, part: int) -> Iterator[Record | Fault]:
        """The records of a part, in order, and the faults in the place of those that have one."""

    def fingerprint(self) -> str:
        """Changes with the data. Raises ConfigError for data without files of records."""


class FileSource:
    """The records of files and folders (`formats.Records`)."""

    text_processor = None

    def __init__(self, name: str, where: str, records: Records) -> None:
        self.name, self.where, self.shards = name, where, []
        self.parts: list[tuple[Part, range]] = []
        for part in records.parts:
            every = range(len(part.source))
            self.parts += [(part, every[start : start + PART]) for start in every[::PART]]
        self.num_parts = len(self.parts)
        listed = [part.source.base for part in records.parts if isinstance(part.source, ListedRecords)]
        self.folders = [os.path.realpath(base) for base in listed if os.path.isdir(base)]
        self._listings: dict[str, set[str]] = {}

    def read(self, part: int) -> Iterator[Record | Fault]:
        file, indices = self.parts[part]
        found = file.records(indices, False, file.find.checked(self._listings))
        for index, record in zip(indices, found, strict=True):
            if isinstance(record, ConfigError):
                where = file.source.where(index)
                alone = None
                if os.path.isfile(where):  # in a folder of pictures and texts
                    alone = Record((Message("user", (Picture(where),)),), where, where)
                yield Fault(where, str(record).removeprefix(where).strip(), record=alone)
            else:
                yield record

    def fingerprint(self) -> str:
        states = []
        for part, indices in self.parts:
            if isinstance(part.source, ListedRecords):
                states.append(f"{part.source.base} {digest(self._listed(part.source, indices))}")
            elif isinstance(part.source, ParquetRows):
                states.append(file_state(part.source.path))
            else:
                states.append(file_state(part.source.file.path))
            states.append(f"{part.find.folder} {indices} {sorted(part.columns.items())}")
        return digest(states)

    @staticmethod
    def _listed(source: ListedRecords, indices: Iterable[int]) -> Iterator[str]:
        """The content of records whose texts may be in files of their own."""
        with source.reader() as read:
            for index in indices:
                try:
                    yield str(read(index))
                except ConfigError as fault:
                    yield str(fault)


class ShardSource:
    """The samples of shards as a stream of captions or conversations reads them."""

    folders: list[str] = []

    def __init__(self, name: str, stream: ImageTextStream | ConversationStream) -> None:
        self.name, self.where, self.stream = name, f"{shorten(stream.shards)}, shards", stream
        self.shards, self.num_parts = stream.shards, stream.num_parts
        self.text_processor = getattr(stream, "text_processor", None)
        self.faults = stream.read = Faults(name, self.num_parts)

    def read(self, part: int) -> Iterator[Record | Fault]:
        for sample in self.stream.part(part):
            yield from self.faults.take_all()
            if isinstance(sample, RawRecord):
                yield sample.record
            else:
                where = f"{sample.shard} member {sample.key}"
                yield captioned(sample.image_id, sample.image, sample.caption, where)
        yield from self.faults.take_all()

    def fingerprint(self) -> str:
        return digest(map(file_state, self.shards))


class Faults(Gate):
    """Keeps each sample that a stream leaves out, and never ends the stream."""

    def __init__(self, name: str, num_shards: int) -> None:
        super().__init__(name, num_shards)
        self.found: list[Fault] = []

    def drop(self, cause: str, where: str, detail: str = "", verb: str = "left out") -> None:
        if cause == EMPTY:  # which is found of any shard
            return
        if cause in SHARD_CAUSES:
            self.found.append(Fault(where, f"{cause}: {detail}" if detail else cause, "shard"))
            return
        key, sign, rest = detail.partition(": ") if ": " in detail else detail.partition(" has ")
        where = f"{where} member {key}"
        if cause == MISTAKE:
            self.found.append(Fault(where, rest.removeprefix(where).strip()))
        else:
            self.found.append(Fault(where, f"{cause}{', but' if sign == ' has ' else ''}{sign}{rest}", "left_out"))

    def check(self) -> None:
        pass

    def take_all(self) -> list[Fault]:
        taken, self.found = self.found, []
        return taken


class AlignSource:
    """A folder of cc_sbu_align's form: `filter_cap.json` and the folder `image`."""

    shards: list[str] = []
    folders: list[str] = []
    text_processor = None

    def __init__(self, name: str, folder: str) -> None:
        """Raises ConfigError if the list of captions is broken as a whole."""
        self.name, self.where = name, os.path.abspath(os.path.expanduser(folder))
        self.file, images = os.path.join(self.where, ALIGN_FILE), os.path.join(self.where, "image")
        if missing := next((path for path in (self.file, images) if not os.path.exists(path)), None):
            raise ConfigError(f"{folder}: there is no {missing}.")
        self.annotations = load_annotations(self.file)
        self.images, self.pictures = images, list_pictures(images)
        self.num_parts = -(-len(self.annotations) // PART)

    def read(self, part: int) -> Iterator[Record | Fault]:
        for number in range(len(self.annotations))[part * PART :][:PART]:
            item, where = self.annotations[number], f"{self.file} annotations[{number}]"
            image_id = item.get("image_id") if isinstance(item, dict) else None
            picture = self.pictures.get(str(image_id))
            if not isinstance(image_id, str | int):
                yield Fault(where, f"is {shown(item)}, without 'image_id'.")
            elif picture is None:
                yield Fault(where, f"has no picture {self.images}/{image_id}{{{','.join(SUFFIXES)}}}.")
            else:
                yield captioned(str(image_id), os.path.join(self.images, picture), item.get("caption"), where)

    def fingerprint(self) -> str:
        return digest([file_state(self.file)])


def file_state(path: str) -> str:
    """The path, size and time of a file; of a URL or a command, itself."""
    if not is_local(path):
        return path
    state = os.stat(path)
    return f"{os.path.abspath(path)} {state.st_size} {state.st_mtime_ns}"


def digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode("utf-8", errors="surrogateescape")).hexdigest()[:16]


def captioned(id: str, picture: str | bytes, caption: Any, where: str) -> Record | Fault:
    """A picture with its caption as a record."""
    try:
        messages = Message("user", (Picture(picture),)), Message("assistant", (usable(caption),))
    except Unusable as cause:
        return Fault(where, str(cause), "text")
    return Record(messages, id, where)


def shorten(paths: list[str]) -> str:
    """The first and the last of paths."""
    return paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]} ({len(paths):,})"
