"""Recognises the format of a user's files by their content, and reads their records."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from glob import has_magic
from typing import Any

import numpy as np

from minigpt4.common.errors import ConfigError, check_names
from minigpt4.datasets.conversations import forms
from minigpt4.datasets.conversations.listed import ListedRecords, open_coco, open_folder
from minigpt4.datasets.conversations.parquet import ParquetRows
from minigpt4.datasets.conversations.pictures import PictureFolder
from minigpt4.datasets.conversations.record import Record
from minigpt4.datasets.conversations.shards import ShardRecords
from minigpt4.datasets.conversations.text_files import (
    Table,
    TextFile,
    TextRecords,
    parse_json,
    scan_json_list,
    scan_lines,
    shown,
)
from minigpt4.datasets.datasets.packed_strings import PackedStrings
from minigpt4.datasets.datasets.shards import expand_shards, is_local

log = logging.getLogger(__name__)

FORMS: dict[str, Callable[[Mapping], forms.Turns]] = {
    "jsonl": forms.ours,
    "llava": forms.conversations,
    "sharegpt": forms.conversations,
    "openai": forms.openai,
    "csv": forms.ours,
    "tsv": forms.ours,
    "folder": forms.ours,
    "coco": forms.ours,
    "flickr": forms.ours,
    "parquet": forms.any_of_these,
    "shards": forms.any_of_these,
}
# Names of columns that are recognised by themselves.
COLUMNS = {
    "id": ("id",),
    "image": ("image", "image_path", "img", "file_name", "filename", "file", "path", "image_name"),
    "images": ("images",),
    "prompt": ("prompt", "question", "instruction", "query"),
    "answer": ("answer", "response", "output"),
    "caption": ("caption", "text", "description", "comment"),
    "system": ("system",),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "texts": ("texts",),
}
ANSWERS = ("answer", "caption", "messages", "conversations", "texts")
FLICKR_LINE = re.compile(r"(?P<id>(?P<image>.+)#\d+)\t(?P<caption>.*)")
TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
HEAD = 1 << 20  # bytes by which a file is recognised


@dataclass
class Part:
    """The records of one file or folder."""

    source: TextRecords | ListedRecords | ParquetRows
    form: Callable[[Mapping], forms.Turns]
    find: PictureFolder
    columns: Mapping[str, str]
    """{our key: its name in the file}."""

    def record(self, read: Callable[[int], dict], index: int, find: PictureFolder) -> Record:
        where = self.source.where(index)
        try:
            item = read(index)
            if self.columns:
                named = {ours: item.pop(theirs, None) for ours, theirs in self.columns.items()}
                item |= named
            return forms.make_record(self.form, item, find, where)
        except ConfigError as error:
            raise ConfigError(f"{where} {error}") from None


class Records(Sequence[Record]):
    """The records of files and folders, parsed at each access. `ids` are those of all, once `read_records` read them.

    An item raises ConfigError for a record with a mistake in it.
    """

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self.ids: Sequence[str] = ()
        self._ends = np.cumsum([len(part.source) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self.parts[number]
        with part.source.reader() as read:
            return part.record(read, index - (int(self._ends[number - 1]) if number else 0), part.find)

    def checked(self) -> Iterator[Record | ConfigError]:
        """All records in order, each file read once. A record with a mistake comes as the error.

        Pictures must be there. The bytes of those in Parquet are not read: they come as b"".
        """
        listings: dict[str, set[str]] = {}
        for part in self.parts:
            find = part.find.checked(listings)
            with part.source.reader(check=True) as read:
                for index in range(len(part.source)):
                    try:
                        yield part.record(read, index, find)
                    except ConfigError as error:
                        yield error


def read_records(
    storage: str | list[str],
    images: str | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    name: str = "conversation",
) -> tuple[str, Records | ShardRecords]:
    """The name of the format and the records; those of files and folders are all checked, those of shards are not.

    The arguments are those of `open_records`. Raises ConfigError for the first record with a mistake.
    """
    format, records = open_records(storage, images, format, columns, name)
    if isinstance(records, Records):
        records.ids = PackedStrings(_checked_ids(records))
    return format, records


def _checked_ids(records: Records) -> Iterator[str]:
    for record in records.checked():
        if isinstance(record, ConfigError):
            raise record
        yield record.id


def open_records(
    storage: str | list[str],
    images: str | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    name: str = "conversation",
) -> tuple[str, Records | ShardRecords]:
    """The name of the format and the records, not checked yet.

    storage: files, folders or shards, with brace ranges and globs.
    images: the folder that paths of pictures start from; None: the folder of the file that names them.
    format: a key of FORMS, or "auto".
    columns: {our key: name of the column}, e.g. {"image": "file_name", "caption": "text"}.
    name: the dataset's name in the YAML, for messages.
    Raises ConfigError for missing, unknown, empty or broken files.
    """
    key = f"datasets.{name}.build_info"
    check_names([format], ["auto", *FORMS], lambda value: f"{key}.format={value} is not known")
    check_names(columns or (), COLUMNS, lambda value: f"Unknown key {key}.columns.{value}")
    images = images and os.path.abspath(os.path.expanduser(images))
    if images and not os.path.isdir(images):
        raise ConfigError(f"{key}.images: there is no folder {images}.")
    paths, streamed = _paths(storage, name)
    if streamed:
        return "shards", ShardRecords(paths, FORMS["shards" if format == "auto" else format], columns)
    formats = [recognise(path) if format == "auto" else format for path in paths]
    parts = [open_part(*pair, images, columns) for pair in zip(paths, formats, strict=True)]
    empty = next((path for path, part in zip(paths, parts, strict=True) if not len(part.source)), None)
    if empty:
        raise ConfigError(f"{empty} has no records.")
    return ", ".join(dict.fromkeys(formats)), Records(parts)


def _paths(storage: str | list[str], name: str) -> tuple[list[str], bool]:
    """All files or shards that `storage` names, and whether they are shards."""
    key = f"datasets.{name}.build_info.storage"
    items = [storage] if isinstance(storage, str) else list(storage or [])
    if not items or not all(isinstance(item, str) and item.strip() for item in items):
        raise ConfigError(f"{key}={storage!r} names no file. Set it in the YAML or with --options {key}=/data/my.jsonl")
    streamed = [item for item in items if not is_local(item) or item.endswith(TARS)]
    if streamed:
        if len(streamed) < len(items):
            raise ConfigError(f"{key} has shards and files ({streamed[0]}, …). Make them two datasets.")
        return expand_shards(items, name), True
    paths = []
    for item in items:
        path = os.path.expanduser(item)
        if os.path.exists(path):
            paths.append(path)
        elif has_magic(item) or "{" in item:
            paths += expand_shards(item, name)
        else:
            raise ConfigError(f"{key}={item}: there is no file or folder {os.path.abspath(path)}.")
    return paths, False


def recognise(path: str) -> str:
    """The format of a file or folder, a key of FORMS. Raises ConfigError that shows how the file begins."""
    if os.path.isdir(path):
        return "folder"
    with TextFile(path).open() as file:
        head = file.read(HEAD)
    if head.startswith(b"PAR1"):
        return "parquet"
    text = head.decode(errors="replace").lstrip()
    line = text.partition("\n")[0]
    format = _recognise_json(text) if text.startswith(("[", "{")) else None
    if FLICKR_LINE.match(line) or re.match(r"image_name\W+comment", line.lower()):
        format = "flickr"
    elif not text.startswith(("[", "{")) and re.search("[,;|\t]", line):
        format = "tsv" if "\t" in line else "csv"
    if format is None:
        raise ConfigError(
            f"{path} is of no known format; it begins {shown(text)}. Known: {', '.join(FORMS)} (docs/own_data.md); "
            "build_info.format names one."
        )
    return format


def _recognise_json(text: str) -> str | None:
    def has(key: str) -> bool:
        return re.search(f'"{key}"\\s*:', text) is not None

    if text.startswith("{") and re.search(r'"(images|annotations)"\s*:\s*\[\s*\{', text):
        return "coco"
    if has("conversations"):
        return "llava" if has("image") else "sharegpt"
    if has("messages"):
        is_ours = has("images?") or re.search(r'"type"\s*:\s*"image"', text)
        return "jsonl" if is_ours and not has("image_url") else "openai"
    return "jsonl" if any(map(has, ("caption", "prompt", "answer"))) else None


def open_part(path: str, format: str, images: str | None, columns: Mapping[str, str] | None) -> Part:
    """The records of a file or folder in a format. Raises ConfigError for one that is broken as a whole."""
    is_folder = os.path.isdir(path)
    if is_folder != (format == "folder"):
        raise ConfigError(f"{path} is a {'folder' if is_folder else 'file'}; build_info.format={format} does not fit.")
    if format == "shards":
        raise ConfigError(f"{path}: shards end in {', '.join(TARS)}. Rename the file.")
    base = os.path.abspath(path) if is_folder else os.path.dirname(os.path.abspath(path))
    find = PictureFolder(images or base, "build_info.images" if images else f"the folder of {path}")
    names: dict[str, str] = dict(columns or {})
    if format == "folder":
        source = open_folder(base, images)
    elif format == "coco":
        source = open_coco(path)
    elif format == "parquet":
        source = ParquetRows(path)
        names = name_columns(path, source.columns, names)
    else:
        source, table = open_text(TextFile(path), format)
        if table:
            names = name_columns(path, table.columns, names)
    return Part(source, FORMS[format], find, names)


def open_text(file: TextFile, format: str) -> tuple[TextRecords, Table | None]:
    """The records of a text file in a format, and its table if it is one."""
    with file.open() as stream:
        head = stream.read(HEAD).decode(errors="replace").lstrip()
    line = head.partition("\n")[0]
    if format == "flickr" and FLICKR_LINE.match(line):
        return TextRecords(file, scan_lines(file), parse_flickr), None
    if format in ("csv", "tsv", "flickr"):
        table = Table(file, "\t" if format == "tsv" else max(",;|", key=line.count))
        return TextRecords(file, table.spans(file), table.parse), table
    if head.startswith("["):
        return TextRecords(file, scan_json_list(file), parse_json, "record"), None
    return TextRecords(file, scan_lines(file), parse_json), None


def parse_flickr(text: str) -> dict[str, str]:
    """A line of a token file: `1000092795.jpg#0`, a tab, and the caption."""
    match = FLICKR_LINE.fullmatch(text.rstrip("\r\n"))
    if not match:
        raise ConfigError(f"is {shown(text)}, not NAME.jpg#NUMBER, a tab, and the caption.")
    return match.groupdict()


def name_columns(path: str, there: list[str], given: Mapping[str, str]) -> dict[str, str]:
    """{our key: column}: those given, and those whose names are known. Raises ConfigError if no text is among them."""
    key = "build_info.columns"
    for ours, column in given.items():
        check_names([column], there, lambda name, ours=ours: f"{key}.{ours}={name} is no column of {path}")
    lower = {name.lower(): name for name in reversed(there)}
    known = {ours: next((lower[n] for n in names if n in lower), None) for ours, names in COLUMNS.items()}
    named: dict[str, Any] = known | dict(given)
    if not any(named[ours] for ours in ANSWERS):
        raise ConfigError(
            f"{path} has the columns {', '.join(there)}. Which are the picture and its text? Name them: "
            f"{key}: {{image: …, caption: …}} or {{image: …, prompt: …, answer: …}}."
        )
    return {ours: column for ours, column in named.items() if column}
