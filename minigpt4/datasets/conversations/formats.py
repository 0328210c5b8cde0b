"""Recognises the format of a user's files by their content, and reads their records."""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from glob import has_magic

import numpy as np

from minigpt4.common.errors import ConfigError, check_names
from minigpt4.datasets.conversations import forms, text_files
from minigpt4.datasets.conversations.listed import ListedRecords, open_coco, open_folder
from minigpt4.datasets.conversations.parquet import ParquetRows
from minigpt4.datasets.conversations.pictures import PictureFolder
from minigpt4.datasets.conversations.record import Record
from minigpt4.datasets.conversations.shards import ShardRecords
from minigpt4.datasets.conversations.text_files import TextFile, TextRecords, shown
from minigpt4.datasets.datasets.packed_strings import PackedStrings
from minigpt4.datasets.datasets.shards import expand_shards, how_to_set, is_local, listed_storage

FORMS: dict[str, forms.Form] = {
    "jsonl": forms.ours,
    "llava": forms.conversations,
    "sharegpt": forms.conversations,
    "openai": forms.openai,
    **dict.fromkeys(("csv", "tsv", "folder", "coco", "flickr"), forms.ours),
    **dict.fromkeys(("parquet", "shards"), forms.any_form),
}
TABLES = ("csv", "tsv", "flickr", "parquet")
# Names of columns that are found by themselves.
COLUMNS = {
    "id": ("id",),
    "system": ("system",),
    "image": ("image", "image_path", "img", "file_name", "filename", "file", "path", "image_name"),
    "images": ("images",),
    "prompt": ("prompt", "question", "instruction", "query"),
    "answer": ("answer", "response", "output"),
    "caption": ("caption", "text", "description", "comment"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "texts": ("texts",),
}
TEXTS = ("answer", "caption", "messages", "conversations", "texts")
FLICKR_LINE = re.compile(r"(?P<id>(?P<image>.+)#\d+)\t(?P<caption>.*)")
TARS = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz")
HEAD = 16 << 20  # bytes by which a file is recognised: its first record may have a picture in it


@dataclass
class Part:
    """The records of one file or folder."""

    source: TextRecords | ListedRecords | ParquetRows
    form: forms.Form
    find: PictureFolder
    columns: Mapping[str, str]
    """Of a table: {our key: column}."""

    def records(self, indices: Sequence[int], check: bool, find: PictureFolder) -> Iterator[Record | ConfigError]:
        """The records at some indices; a mistake comes as the error."""
        with self.source.reader(check) as read:
            for index in indices:
                where = self.source.where(index)
                try:
                    item = read(index)
                    if self.columns:
                        item = {ours: item[column] for ours, column in self.columns.items()}
                    yield forms.make_record(self.form, item, find, where)
                except ConfigError as error:
                    yield ConfigError(f"{where} {error}")


class Records(Sequence[Record]):
    """The records of files and folders, parsed at each access. An item with a mistake in it raises ConfigError.

    ids, text_lengths, digest: of all records, once `read_records` has checked them. The lengths are in characters, the
    digest is of their ids and messages.
    """

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self.ids = PackedStrings(())
        self.digest = ""
        self.text_lengths = np.empty(0, np.int64)
        self._chosen: np.ndarray | None = None
        self._ends = np.cumsum([len(part.source) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._chosen is None else len(self._chosen)

    def select(self, chosen: np.ndarray) -> "Records":
        """The records at which `chosen` (bool) is true."""
        selected = copy(self)
        selected._chosen, selected.ids = np.flatnonzero(chosen), self.ids.select(chosen)
        selected.text_lengths = self.text_lengths[chosen]
        selected.digest = f"{self.digest} {selected.ids.digest()}"
        return selected

    def __getitem__(self, index: int) -> Record:
        part, row = self._place(index)
        (record,) = part.records([row], False, part.find)
        if isinstance(record, ConfigError):
            raise record
        return record

    def where(self, index: int) -> str:
        """The file and line of a record."""
        part, row = self._place(index)
        return part.source.where(row)

    def _place(self, index: int) -> tuple[Part, int]:
        index = range(len(self))[index]
        index = index if self._chosen is None else int(self._chosen[index])
        number = int(np.searchsorted(self._ends, index, side="right"))
        part = self.parts[number]
        return part, index - int(self._ends[number]) + len(part.source)

    def checked(self) -> Iterator[Record | ConfigError]:
        """All records of the files in order, each file read once. A record with a mistake comes as the error.

        Pictures must be there. The bytes of those in Parquet are not read: they come as b"".
        """
        listings: dict[str, set[str]] = {}
        for part in self.parts:
            yield from part.records(range(len(part.source)), True, part.find.checked(listings))

    def check(self) -> None:
        """Set `ids`, `text_lengths` and `digest`. Raises ConfigError for the first mistake."""
        digest, lengths = hashlib.sha256(), []

        def ids() -> Iterator[str]:
            for record in self.checked():
                if isinstance(record, ConfigError):
                    raise record
                texts = [part for message in record.messages for part in message.parts if isinstance(part, str)]
                digest.update(repr((record.id, texts)).encode())
                lengths.append(sum(map(len, texts)))
                yield record.id

        self.ids = PackedStrings(ids())
        self.text_lengths = np.array(lengths)
        self.digest = digest.hexdigest()[:16]


def read_records(
    storage: str | Sequence[str],
    images: str | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    name: str = "conversation",
    check: bool = True,
) -> tuple[str, Records | ShardRecords]:
    """The name of the format and the records.

    storage: files, folders or shards, with brace ranges and globs.
    images: the folder that paths of pictures start from; None: the folder of the file that names them.
    format: a key of FORMS, or "auto".
    columns: of a table, {our key: column}, e.g. {"image": "file_name", "caption": "label"}.
    name: the dataset's name in the YAML, for messages.
    check: whether all records of files and folders are checked now. Those of shards are not.
    Raises ConfigError for missing, unknown, empty or broken files, and for the first record with a mistake.
    """
    key = f"datasets.{name}.build_info"
    check_names([format], ["auto", *FORMS], lambda value: f"{key}.format={value} is not known")
    check_names(columns or (), COLUMNS, lambda value: f"Unknown key {key}.columns.{value}")
    if not isinstance(images, str | None):
        raise ConfigError(f"{key}.images={images!r} is no path of a folder.")
    images = images and os.path.abspath(os.path.expanduser(images))
    if images and not os.path.isdir(images):
        raise ConfigError(f"{key}.images: there is no folder {images}.")
    paths, streamed = _paths(storage, name)
    if streamed:
        return "shards", ShardRecords(paths, FORMS["shards" if format == "auto" else format])
    formats = [recognise(path) if format == "auto" else format for path in paths]
    if columns and not set(formats) <= set(TABLES):
        raise ConfigError(f"{key}.columns is for tables ({', '.join(TABLES)}); the files are {', '.join(formats)}.")
    records = Records([open_part(*pair, images, columns) for pair in zip(paths, formats, strict=True)])
    if check:
        records.check()
    return ", ".join(dict.fromkeys(formats)), records


def _paths(storage: str | Sequence[str], name: str) -> tuple[list[str], bool]:
    """All files or shards that `storage` names, and whether they are shards."""
    key = f"datasets.{name}.build_info.storage"
    items = listed_storage(storage, name, "file", how_to_set(name, "/data/my.jsonl"))
    streamed = [not is_local(item) or item.endswith(TARS) for item in items]
    if all(streamed):
        return expand_shards(items, name), True
    if any(streamed):
        raise ConfigError(f"{key}={storage} has shards and files. Make them two datasets.")
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
    text, line = TextFile(path).begin(HEAD)
    if text.startswith("PAR1"):
        return "parquet"
    format = None
    if text.startswith(("[", "{")):
        format = _recognise_json(text)
    elif FLICKR_LINE.match(line) or re.match(r"image_name\W+comment", line.lower()):
        format = "flickr"
    elif re.search("[,;|\t]", line):
        format = "tsv" if "\t" in line else "csv"
    if not text:
        raise ConfigError(f"{path} is empty.")
    if format is None:
        raise ConfigError(
            f"{path} is of no known format; it begins {shown(text)}. Known: {', '.join(FORMS)} (docs/own_data.md); "
            "build_info.format names one."
        )
    return format


def _recognise_json(text: str) -> str | None:
    def has(key: str) -> bool:
        return re.search(f'"{key}"\\s*:', text) is not None

    listed = re.search(r'"(images|annotations)"\s*:\s*\[\s*\{', text)
    if text.startswith("{") and listed and not has("messages|conversations|image"):
        return "coco"
    if has("conversations"):
        return "llava" if has("image") else "sharegpt"
    if has("messages"):
        is_ours = has("images?") or re.search(r'"type"\s*:\s*"image"', text)
        return "jsonl" if is_ours and not has("image_url") else "openai"
    return "jsonl" if has("caption|prompt|answer") else None


def open_part(path: str, format: str, images: str | None, columns: Mapping[str, str] | None) -> Part:
    """The records of a file or folder in a format. Raises ConfigError for one that is empty or broken as a whole."""
    is_folder = os.path.isdir(path)
    if is_folder != (format == "folder") or format == "shards":
        raise ConfigError(
            f"build_info.format={format} does not fit {path}, a {'folder' if is_folder else 'file'}. Shards end in "
            f"{', '.join(TARS)}."
        )
    base = os.path.abspath(path) if is_folder else os.path.dirname(os.path.abspath(path))
    names: list[str] | None = None
    if is_folder:
        source = open_folder(base, images)
    elif format == "coco":
        source = open_coco(path)
    elif format == "parquet":
        source = ParquetRows(path)
        names = source.columns
    else:
        source, names = open_text(TextFile(path), format)
    if not len(source):
        raise ConfigError(f"{path} has no records.")
    find = PictureFolder(images or base, "build_info.images" if images else f"the folder of {path}")
    return Part(source, FORMS[format], find, {} if names is None else name_columns(path, names, columns or {}))


def open_text(file: TextFile, format: str) -> tuple[TextRecords, list[str] | None]:
    """The records of a text file in a format, and the names of its columns if it is a table."""
    text, line = file.begin(HEAD)
    if format == "flickr" and FLICKR_LINE.match(line):
        return TextRecords(file, text_files.scan_lines(file), parse_flickr), None
    if format in TABLES:
        table = text_files.Table(file, "\t" if format == "tsv" else max(",;|", key=line.count))
        return TextRecords(file, table.scan(file), table.parse), table.columns
    if text.startswith("["):
        return TextRecords(file, text_files.scan_json_list(file), text_files.parse_json, "record"), None
    return TextRecords(file, text_files.scan_lines(file), text_files.parse_json), None


def read_items(path: str) -> Iterator[tuple[str, dict]]:
    """(its place, the object) of each line of a .jsonl file, or of each item of a JSON list. Raises ConfigError."""
    source, _ = open_text(TextFile(path), "jsonl")
    with source.reader() as read:
        for index in range(len(source)):
            try:
                yield source.where(index), read(index)
            except ConfigError as error:
                raise ConfigError(f"{source.where(index)} {error}") from None


def parse_flickr(text: str) -> dict[str, str]:
    """A line of a token file: `1000092795.jpg#0`, a tab, and the caption."""
    match = FLICKR_LINE.fullmatch(text.rstrip("\r\n"))
    if not match:
        raise ConfigError(f"is {shown(text)}, not NAME.jpg#NUMBER, a tab, and the caption.")
    return match.groupdict()


def name_columns(path: str, there: list[str], given: Mapping[str, str]) -> dict[str, str]:
    """{our key: column}: those given, and those with known names; other texts only if none is given.

    Raises ConfigError if no text is among them.
    """
    for ours, column in given.items():
        check_names([column], there, lambda name, ours=ours: f"build_info.columns.{ours}={name} is no column of {path}")
    lower = {name.lower(): name for name in reversed(there)}
    open_keys = [ours for ours in COLUMNS if ours not in ("prompt", *TEXTS) or not set(TEXTS) & set(given)]
    known = {ours: lower[name] for ours in open_keys for name in reversed(COLUMNS[ours]) if name in lower}
    named = known | dict(given)
    if not set(TEXTS) & set(named):
        raise ConfigError(
            f"{path} has the columns {shown(there)} (its first line). Which are the picture and its text? "
            "Name them: build_info.columns.image=… with build_info.columns.caption=…, or with "
            "build_info.columns.prompt=… and build_info.columns.answer=…."
        )
    doubled = next((column for column in named.values() if there.count(column) > 1), None)
    if doubled:
        raise ConfigError(f"{path} has several columns {doubled!r} (its first line). Give each a name of its own.")
    return named
