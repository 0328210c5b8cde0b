"""The datasets of a config, or a user's files, as records and faults that are read part by part.

A caption is a conversation of a picture and an answer, so that one form stands for all.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from omegaconf import OmegaConf

from minigpt4.common.errors import ConfigError
from minigpt4.common.facts import cached_features
from minigpt4.common.rgb import from_array
from minigpt4.datasets.captions import Unusable, load_json, usable
from minigpt4.datasets.conversations.formats import Part, Records, read_records
from minigpt4.datasets.conversations.listed import ListedRecords
from minigpt4.datasets.conversations.parquet import ParquetRows
from minigpt4.datasets.conversations.record import Message, Picture, Record
from minigpt4.datasets.conversations.shards import ShardRecords
from minigpt4.datasets.conversations.stream import ConversationStream, RawRecord
from minigpt4.datasets.conversations.text_files import shown
from minigpt4.datasets.datasets.cc_sbu_dataset import SUFFIXES
from minigpt4.datasets.datasets.image_text_stream import ImageTextStream
from minigpt4.datasets.datasets.shards import is_local
from minigpt4.datasets.datasets.tar_reader import CORRUPT, CUT_OFF, JOINED, UNREADABLE
from minigpt4.datasets.left_out import Gate
from minigpt4.processors import BaseProcessor

# Records of a file that a worker reads at a time.
PART = 1000
# Samples that are looked at of a stream that has no parts.
STREAMED = 1000
SHARD_CAUSES, EMPTY = (UNREADABLE, CORRUPT, CUT_OFF, JOINED), "a shard without samples"
MISTAKE = "a record with a mistake"
# Builders whose files are read here; those of plug-ins make samples.
OURS = ("conversation", "cc_sbu_align", "laion", "cc_sbu")
ALIGN_FILE = "filter_cap.json"


class Fault(NamedTuple):
    """Something that keeps a record, or a part of a shard, from being trained on."""

    where: str
    what: str
    kind: str = "mistake"
    """A key of `check.KINDS`."""


class Source(Protocol):
    """A dataset, or a split of one."""

    name: str
    where: str
    """Its files, for people."""
    num_parts: int
    shards: list[str]
    """Empty: the dataset is none of shards."""
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
        self._listings: dict[str, set[str]] = {}

    def read(self, part: int) -> Iterator[Record | Fault]:
        file, indices = self.parts[part]
        found = file.records(indices, False, file.find.checked(self._listings))
        for index, record in zip(indices, found, strict=True):
            yield _fault(file.source.where(index), record) if isinstance(record, ConfigError) else record

    def fingerprint(self) -> str:
        states = []
        for part, indices in self.parts:
            if isinstance(part.source, ListedRecords):
                states.append(f"{part.source.base} {part.source.items.digest()}")
            elif isinstance(part.source, ParquetRows):
                states.append(file_state(part.source.path))
            else:
                states.append(file_state(part.source.file.path))
            states.append(f"{part.find.folder} {indices} {sorted(part.columns.items())}")
        return digest(states)


class ShardSource:
    """The samples of shards as a stream of captions or conversations reads them."""

    def __init__(self, name: str, stream: ImageTextStream | ConversationStream) -> None:
        self.name, self.where, self.stream = name, f"{_named(stream.shards)}, shards", stream
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
    text_processor = None

    def __init__(self, name: str, folder: str) -> None:
        """Raises ConfigError if the list of captions is broken as a whole."""
        self.name, self.where = name, os.path.abspath(os.path.expanduser(folder))
        self.file, self.images = os.path.join(self.where, ALIGN_FILE), os.path.join(self.where, "image")
        try:
            with open(self.file, "rb") as file:
                content = load_json(file.read())
        except Unusable as error:
            raise ConfigError(f"{self.file}: {error}: {error.__cause__ or ''}") from None
        self.annotations = content.get("annotations") if isinstance(content, dict) else None
        if not isinstance(self.annotations, list) or not self.annotations:
            raise ConfigError(f"{self.file} has no records under the key 'annotations'.")
        names = sorted(os.listdir(self.images), reverse=True)
        self.pictures: dict[str, str] = {}
        for suffix in reversed(SUFFIXES):  # of several pictures with one name, the dataset takes the first of these
            found = [os.path.splitext(name) for name in names if name.lower().endswith(suffix)]
            self.pictures |= {stem: stem + ending for stem, ending in found}
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


class PluginSource:
    """A split of a plug-in's dataset, as far as `common.contracts` describes samples: "image" and "text_input".

    Pictures are those that its processor has made. Of a stream without parts, STREAMED samples are read.
    """

    shards: list[str] = []
    text_processor = None

    def __init__(self, name: str, dataset: Any) -> None:
        self.name, self.where, self.dataset = name, type(dataset).__name__, dataset
        self.has_length, self.has_parts = hasattr(dataset, "__len__"), hasattr(dataset, "part")
        if self.has_length:
            self.num_parts = -(-len(dataset) // PART)
        else:
            self.num_parts = dataset.num_parts if self.has_parts else 1

    def read(self, part: int) -> Iterator[Record | Fault]:
        for where, load in self._samples(part):
            try:
                sample = load()
            except StopIteration:
                return
            except Exception as error:  # of any kind: the code is the plug-in's
                yield Fault(where, f"raises {type(error).__name__}: {error}")
            else:
                yield sample_record(sample, where)

    def fingerprint(self) -> str:
        raise ConfigError(f"{self.name}: {self.where} gives samples, not records of files. It cannot be converted.")

    def _samples(self, part: int) -> Iterator[tuple[str, Callable[[], Any]]]:
        """The place of each sample, and the function that loads it."""
        if self.has_length:
            for index in range(len(self.dataset))[part * PART :][:PART]:
                yield f"{self.name}[{index}]", partial(self.dataset.__getitem__, index)
        elif self.has_parts:
            for raw in self.dataset.part(part):
                fields = {"text_input": raw.caption, "image_id": raw.image_id}
                yield f"{self.name} {raw.image_id}", lambda raw=raw, fields=fields: self.dataset.load(raw) | fields
        else:
            samples = iter(self.dataset)
            for number in range(STREAMED):
                yield f"{self.name} sample {number}", partial(next, samples)


def sample_record(sample: Any, where: str) -> Record | Fault:
    """A sample as training gets it, as a record with its processed picture."""
    text = sample.get("text_input") if isinstance(sample, Mapping) else None
    image = sample.get("image") if isinstance(sample, Mapping) else None
    picture = to_png(image) if getattr(image, "ndim", 0) == 3 else None
    if not isinstance(text, str):
        return Fault(where, f"has {shown(text)} for 'text_input', not a text.", "text")
    asked = () if picture is None else (Picture(picture),)
    messages = Message("user", asked), Message("assistant", (text,))
    return Record(messages, str(sample.get("image_id", where)), where)


def to_png(image: Any) -> bytes:
    """A processed picture [3,H,W] as a file. Floats are scaled from their own range to 0 … 255."""
    array = image.numpy().transpose(1, 2, 0)
    if array.dtype.kind == "f":
        array = (array - array.min()) / max(float(np.ptp(array)), 1e-6)
    buffer = io.BytesIO()
    from_array(array).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


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


def _named(paths: list[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{paths[0]} … {paths[-1]} ({len(paths):,})"


def _fault(where: str, mistake: ConfigError) -> Fault:
    return Fault(where, str(mistake).removeprefix(where).strip())


def sources_of_config(cfg: Any) -> Iterator[Source]:
    """The datasets of a `Config`. Raises ConfigError for data that cannot be opened at all.

    A share for validation is read with the rest; files for validation are a dataset of their own.
    """
    for name in cfg.datasets_cfg:
        section, builder = cfg.datasets_cfg[name], cfg.builder(name)
        if cached_features(section):
            raise ConfigError(f"datasets.{name} reads cached features. Set build_info.features=null to read pictures.")
        if builder not in OURS:
            for split, dataset in built(cfg, name).items():
                yield PluginSource(name if split == "train" else f"{name}.{split}", dataset)
            continue
        info = section.get("build_info") or {}
        val = info.get("val")
        storages = {name: info.get("storage")} | ({} if isinstance(val, float | int | None) else {f"{name}.val": val})
        for full_name, storage in storages.items():
            if builder == "conversation":
                yield conversations(full_name, storage, info)
            elif builder == "cc_sbu_align" and isinstance(storage, str):
                yield AlignSource(full_name, storage)
            else:
                yield ShardSource(full_name, built(cfg, name, {"storage": storage, "val": None})["train"])


def source_of_files(storage: list[str], info: Mapping[str, Any]) -> Source:
    """A user's files without a config, a folder of cc_sbu_align's form too. info: as for `conversations`."""
    if len(storage) == 1 and not info.get("format"):
        folder = os.path.expanduser(storage[0])
        if os.path.isfile(os.path.join(folder, ALIGN_FILE)):
            return AlignSource("data", folder)
    return conversations("data", storage, info)


def conversations(name: str, storage: Any, info: Mapping[str, Any]) -> Source:
    """The records of `storage` as the builder `conversation` reads them.

    info: may have its keys `images`, `format` and `columns`.
    """
    storage = storage if isinstance(storage, str) else list(storage or [])
    format, columns = info.get("format") or "auto", info.get("columns")
    kind, records = read_records(storage, info.get("images"), format, columns, name, check=False)
    if isinstance(records, ShardRecords):
        return ShardSource(name, ConversationStream(records, BaseProcessor(), name))
    return FileSource(name, f"{_named([storage] if isinstance(storage, str) else storage)}, read as {kind}", records)


def built(cfg: Any, name: str, build_info: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The splits of a dataset that its builder makes. build_info: keys that are changed before."""
    section = cfg.datasets_cfg[name]
    builder = cfg.builder_class(name)(OmegaConf.merge(section, {"build_info": build_info}) if build_info else section)
    builder.name, builder.data_timeout_s = name, 0.0
    return builder.build_datasets()


def processor_of(cfg: Any, source: Source) -> Callable | None:
    """The image processor of a dataset in training; None without a config, and for pictures that are processed."""
    if cfg is None or isinstance(source, PluginSource):
        return None
    name = source.name.removesuffix(".val")
    builder = cfg.builder_class(name)(cfg.datasets_cfg[name])
    builder.name = name
    builder.build_processors()
    return builder.vis_processors["train" if name == source.name else "eval"]
