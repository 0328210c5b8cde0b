"""Conversations from webdataset shards: a sample's .json or .txt in any of the forms, and its pictures."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import chain
from typing import Any

from minigpt4.common.errors import ConfigError
from minigpt4.datasets.captions import Incomplete
from minigpt4.datasets.conversations.forms import Form, make_record, pictures_of
from minigpt4.datasets.conversations.pictures import SUFFIXES, PictureFolder
from minigpt4.datasets.conversations.record import Picture, Record
from minigpt4.datasets.conversations.text_files import decode, parse_json
from minigpt4.datasets.datasets.tar_reader import Group, ShardError, member_id, read_members, read_samples
from minigpt4.datasets.left_out import Tally
from minigpt4.datasets.patience import Patience, PatientFile

FORM_KEYS = {"messages", "conversations", "texts", "answer", "caption", "prompt"}
PICTURES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)


class ShardRecords:
    """The records of shards. A ConfigError for a sample does not end the iterator: the next one follows.

    They come in the order of a shard, those without a picture and those with a mistake at its end: members that they
    lack may follow until then.

    shards: paths, URLs or `pipe:` commands. form: of the .json.
    """

    def __init__(self, shards: list[str], form: Form) -> None:
        self.shards, self.form = shards, form

    def __iter__(self) -> Iterator[Record]:
        return chain.from_iterable(map(self.read, self.shards))

    def read(self, shard: str) -> Iterator[Record]:
        """The records of one shard. Files out of reach are not waited for."""
        return map(_record_or_raise, self._read(shard))

    def record(self, shard: str, group: Group) -> Record:
        """The record of a sample.

        Raises Incomplete while members may follow that it lacks, then ConfigError that names shard and member.
        """
        if not group.has_text:
            raise Incomplete("a sample without text (.json or .txt)")
        where = f"{shard} member {group.key}"
        try:
            record = self._record(shard, group, where)
        except ConfigError as error:
            if group.final:
                raise ConfigError(f"{where} {error}") from None
            raise Incomplete(str(error)) from None
        if not (group.final or record.pictures):
            raise Incomplete("a sample without picture")
        return record

    def _read(self, shard: str) -> Iterator[Record | ConfigError]:
        mistakes: list[ConfigError] = []

        def make(group: Group) -> Record | ConfigError:
            try:
                return self.record(shard, group)
            except ConfigError as mistake:
                return mistake

        def drop(cause: str, detail: str) -> None:
            mistakes.append(ConfigError(f"{shard} member {detail}: {cause}."))

        with closing(PatientFile(shard, Patience(Tally(shard), lambda path: False))) as file:
            try:
                yield from read_samples(read_members(file, PICTURES), make, drop, several_pictures=True)
            except ShardError as error:
                text = f"{shard} cannot be read to its end: {error}. {error.detail} Fetch it again."
                mistakes.append(ConfigError(text))
        yield from mistakes

    def _record(self, shard: str, group: Group, where: str) -> Record:
        item = parse_json(decode(group.files["json"])) if "json" in group.files else {}
        if not any(item.get(key) is not None for key in FORM_KEYS) and "txt" in group.files:
            item["caption"] = decode(group.files["txt"]).rstrip("\r\n")
        item = {"id": member_id(shard, group.key)} | item
        find = _MemberPictures(group.key, group.files, len(pictures_of(item)))
        in_parts = re.search(rb'"image(_url)?"\s*:', group.files.get("json", b""))
        if find.members and not pictures_of(item) and not in_parts:
            item["images"] = list(find.members)
        return make_record(self.form, item, find, where)


class _MemberPictures:
    """Finds the pictures of a sample by the names of its members. A single one is meant whatever its name."""

    def __init__(self, key: str, files: Mapping[str, bytes], named: int) -> None:
        self.members = {name: files[name] for name in files if f".{name}".lower().endswith(SUFFIXES)}
        self._by_name = {f"{os.path.basename(key)}.{name}": content for name, content in self.members.items()}
        self._only = next(iter(self.members.values())) if named == len(self.members) == 1 else None

    def __call__(self, value: Any) -> Picture:
        if isinstance(value, str) and not value[:8].lower().startswith(("data:", "http:", "https:")):
            name = os.path.basename(value)
            content = self.members.get(value) or self._by_name.get(name) or self._only
            if content is None:
                there = ", ".join(self._by_name) or "none"
                raise ConfigError(f"has the picture {value!r}, which is no member of it. Its pictures: {there}.")
            return Picture(content)
        return PictureFolder("", "the sample")(value)


def _record_or_raise(found: Record | ConfigError) -> Record:
    if isinstance(found, ConfigError):
        raise found
    return found
