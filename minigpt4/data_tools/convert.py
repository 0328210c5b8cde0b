"""Writes the records of a dataset as shards, or as JSON lines with a folder of pictures.

    <folder>/convert.json    the settings: an interrupted conversion goes on only with the same ones
    <folder>/00000.tar …     shards: a sample is a .json in our form and its pictures
    <folder>/00000.jsonl …   or JSON lines, whose pictures are in
    <folder>/images/ab/…     under a hash of their content, each once

Each part of the dataset becomes one file, which is there as a whole or not at all.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import webdataset as wds
from tqdm import tqdm

from minigpt4.common.errors import ConfigError
from minigpt4.common.files import read_regular
from minigpt4.common.output import own_folder, write_whole
from minigpt4.common.rgb import open_image
from minigpt4.data_tools.processes import in_processes
from minigpt4.data_tools.sources import Fault, Source
from minigpt4.datasets.conversations.forms import PLACE
from minigpt4.datasets.conversations.pictures import SUFFIXES
from minigpt4.datasets.conversations.record import Message, Record
from minigpt4.datasets.datasets.tar_reader import member_id

SETTINGS = "convert.json"
SUFFIX_OF_FORM = {"shards": "tar", "jsonl": "jsonl"}
SUFFIX_OF_FORMAT = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}


class Written(NamedTuple):
    """What became of a part, or of a dataset."""

    records: int
    faults: list[Fault]
    already: int = 0
    """Parts that were there before."""


def convert(source: Source, form: str, folder: Path, workers: int, leave_out: bool) -> Written:
    """Write all records of a dataset to a folder that `open_folder` opened, or those that are missing there.

    form: "shards" or "jsonl". leave_out: whether records with a fault are left out.
    Raises ConfigError for the first record with a fault, if they are not left out.
    """
    parts = [(part, folder / name) for part, name in enumerate(part_names(source, form))]
    missing = [(part, path) for part, path in parts if not path.exists()]
    write = partial(write_part, source, leave_out)
    records, faults = 0, []
    bar = tqdm(in_processes(write, missing, workers), source.name, len(missing), unit="part", disable=not missing)
    for written in bar:
        if written.faults and not leave_out:
            first = written.faults[0]
            raise ConfigError(f"{first.where} {first.what} Correct it, or leave out such records: --leave-out")
        records += written.records
        faults += written.faults
    return Written(records, faults, source.num_parts - len(missing))


def open_folder(source: Source, form: str, folder: Path) -> None:
    """Begin a conversion, or continue that of the folder. Raises ConfigError if it has other files or settings.

    A folder in which no part is written yet can be begun anew.
    """
    settings = {"to": form, "data": source.where, "fingerprint": source.fingerprint()}
    if any(folder.resolve().is_relative_to(place) for place in source.folders):
        raise ConfigError(
            f"--out {folder} is inside the data, which would have its pictures twice. Name another place."
        )
    own_folder(folder, SETTINGS)
    path, other = folder / SETTINGS, list(settings)
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            other = [key for key in settings if found[key] != settings[key]]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"--out {folder}: its {SETTINGS} is not of this command. Name a new folder.") from None
    if not any(list(folder.glob(f"*.{suffix}")) for suffix in SUFFIX_OF_FORM.values()):
        write_whole(path, json.dumps(settings, indent=1))
    elif other:
        changes = "; ".join(f"{key} was {found[key]!r} and is {settings[key]!r}" for key in other)
        raise ConfigError(f"--out {folder} was begun with other settings or data: {changes}. Name a new folder.")


def part_names(source: Source, form: str) -> list[str]:
    """The names of the files of the parts. Shards keep their names, unless two have the same."""
    names = [os.path.basename(shard) for shard in source.shards]
    if form == "shards" and names and len(set(names)) == len(names) and all(name.endswith(".tar") for name in names):
        return names
    return [f"{part:05d}.{SUFFIX_OF_FORM[form]}" for part in range(source.num_parts)]


def write_part(source: Source, leave_out: bool, part_and_path: tuple[int, Path]) -> Written:
    """Write the file of a part, unless it has faults that are not to be left out, or no record without."""
    part, path = part_and_path
    faults: list[Fault] = []
    unfinished = path.with_name(f".{path.name}.part")
    write = write_shard if path.suffix == ".tar" else write_lines
    try:
        with open(unfinished, "wb") as file:
            count = write(file, path, read_samples(source, part, faults, leave_out))
        if count and (leave_out or not faults):
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return Written(count, faults)


Sample = tuple[str, Record, list[tuple[str, bytes]]]
"""Its key in a shard, the record, and (suffix, content) of its pictures."""


def read_samples(source: Source, part: int, faults: list[Fault], leave_out: bool) -> Iterator[Sample]:
    """The records of a part with their pictures. Others are added to `faults`; unless they are left out, it ends."""
    member = f"{source.shards[part]} member " if source.shards else ""
    for number, item in enumerate(source.read(part)):
        if not isinstance(item, Fault):
            key = item.where.removeprefix(member) if member else f"{part:05d}{number:06d}"
            try:
                yield key, item, [read_picture_file(each) for each in item.pictures]
                continue
            except UnreadableError as error:
                item = Fault(item.where, f"{error}.", "picture")
        faults.append(item)
        if not leave_out:
            return


class UnreadableError(ValueError):
    """A picture cannot be read, or has no format that is known."""


def read_picture_file(source: str | bytes) -> tuple[str, bytes]:
    """The suffix, by its name or its format, and the content of a picture, as it is. Raises UnreadableError."""
    try:
        content = read_regular(source) if isinstance(source, str) else source
        own = os.path.splitext(source)[1].lower() if isinstance(source, str) else ""
        if own in SUFFIXES:
            return own[1:], content
        format = open_image(io.BytesIO(content)).format
    except Exception as error:  # Pillow's plug-ins raise nearly every kind of error on broken files
        name = source if isinstance(source, str) else "its picture"
        raise UnreadableError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    suffix = SUFFIX_OF_FORMAT.get(format, format.lower())
    if f".{suffix}" not in SUFFIXES:
        name = source if isinstance(source, str) else "its picture"
        raise UnreadableError(f"{name} is in the format {format}. Save it as a JPEG or PNG")
    return suffix, content


def write_shard(file: BinaryIO, path: Path, samples: Iterable[Sample]) -> int:
    """Write a shard, the file that will be at `path`. Returns the number of samples.

    The samples of a shard keep their keys, and need no id if it follows from them: what belongs to a share `val` is
    decided by the content of those without an id.
    """
    keys: set[str] = set()
    with wds.TarWriter(file, mtime=0) as tar:
        for key, record, pictures in samples:
            while key in keys:
                key += "_"
            keys.add(key)
            several = len(pictures) > 1
            members = {f"{n}.{suffix}" if several else suffix: content for n, (suffix, content) in enumerate(pictures)}
            item = as_item(record, [f"{os.path.basename(key)}.{member}" for member in members])
            if record.id == member_id(path.name, key):
                del item["id"]
            tar.write({"__key__": key, "json": json.dumps(item).encode(), **members})
    return len(keys)


def write_lines(file: BinaryIO, path: Path, samples: Iterable[Sample]) -> int:
    """Write JSON lines, and the pictures that are not in the folder yet. Returns the number of lines."""
    count = 0
    for _, record, pictures in samples:
        names = []
        for suffix, content in pictures:
            digest = hashlib.blake2b(content, digest_size=12).hexdigest()
            names.append(f"images/{digest[:2]}/{digest}.{suffix}")
            picture = path.parent / names[-1]
            if not picture.exists():
                picture.parent.mkdir(parents=True, exist_ok=True)
                write_whole(picture, content)
        line = json.dumps(as_item(record, names), ensure_ascii=False)
        file.write(line.encode(errors="backslashreplace") + b"\n")  # lone surrogates, as JSON escapes them
        count += 1
    return count


def as_item(record: Record, names: list[str]) -> dict[str, Any]:
    """A record in our JSON form. names: of its pictures, in order."""
    item: dict[str, Any] = {"id": record.id}
    item |= {"image": names[0]} if len(names) == 1 else {"images": names} if names else {}
    if [message.role for message in record.messages] == ["user", "assistant"] and len(names) == 1:
        asked, answer = record.messages
        if len(asked.parts) == len(answer.parts) == 1:
            return item | {"caption": answer.parts[0]}
    return item | {"messages": [{"role": m.role, "content": _content(m)} for m in record.messages]}


def _content(message: Message) -> str | list[dict]:
    """A text with places of pictures, if it is read as the same parts; otherwise a list of parts."""
    parts = message.parts
    texts = [part for part in parts if isinstance(part, str)]
    follow_each_other = any(isinstance(a, str) and isinstance(b, str) for a, b in pairwise(parts))
    if follow_each_other or any(PLACE in text for text in texts):
        return [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in parts]
    return "".join(part if isinstance(part, str) else PLACE for part in parts)
