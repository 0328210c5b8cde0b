"""Conversations from webdataset shards: a sample's .json or .txt in any of the forms, and its pictures."""

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from minigpt4.common.errors import ConfigError
from minigpt4.datasets.conversations.forms import Form, make_record, pictures_of
from minigpt4.datasets.conversations.pictures import SUFFIXES, PictureFolder
from minigpt4.datasets.conversations.record import Picture, Record
from minigpt4.datasets.conversations.text_files import decode, parse_json
from minigpt4.datasets.datasets.tar_reader import Group, member_id

FORM_KEYS = {"messages", "conversations", "texts", "answer", "caption", "prompt"}
PICTURES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)


class ShardRecords(NamedTuple):
    """The records in shards, which `stream.ConversationStream` reads."""

    shards: list[str]
    """Paths, URLs or `pipe:` commands."""
    form: Form
    """Of the .json."""


def record_of(form: Form, shard: str, group: Group, where: str) -> Record:
    """The record of a sample's members. Raises ConfigError for a mistake in it."""
    item = parse_json(decode(group.files["json"])) if "json" in group.files else {}
    if not any(item.get(key) is not None for key in FORM_KEYS) and "txt" in group.files:
        item["caption"] = decode(group.files["txt"]).rstrip("\r\n")
    item = {"id": member_id(shard, group.key)} | item
    find = _MemberPictures(group.key, group.files, len(pictures_of(item)))
    in_parts = re.search(rb'"image(_url)?"\s*:', group.files.get("json", b""))
    if find.members and not pictures_of(item) and not in_parts:
        item["images"] = sorted(find.members, key=_by_number)
    return make_record(form, item, find, where)


def _by_number(name: str) -> list[str | int]:
    """Sorts `2.jpg` before `10.jpg`."""
    parts = re.split(r"(\d+)", name)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)]


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
