"""Conversations from webdataset shards, in order: a sample's .json or .txt in any of the forms, and its pictures."""

import os
import re
import tarfile
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from minigpt4.common.errors import ConfigError
from minigpt4.datasets.conversations.forms import Form, make_record, pictures_of
from minigpt4.datasets.conversations.pictures import SUFFIXES, PictureFolder
from minigpt4.datasets.conversations.record import Picture, Record
from minigpt4.datasets.conversations.text_files import decode, parse_json

FORM_KEYS = {"messages", "conversations", "texts", "answer", "caption", "prompt"}


class ShardRecords:
    """The records of shards, in order. A ConfigError for a sample does not end the iterator: the next one follows.

    shards: paths, URLs or `pipe:` commands. form: of the .json.
    """

    def __init__(self, shards: list[str], form: Form) -> None:
        self.shards, self.form = shards, form

    def __iter__(self) -> Iterator[Record]:
        return chain.from_iterable(map(self.read, self.shards))

    def read(self, shard: str) -> Iterator[Record]:
        """The records of one shard."""
        samples = _samples(shard)
        return map(lambda sample: self.record(shard, sample.pop("__key__"), sample), samples)

    def record(self, shard: str, key: str, files: Mapping[str, Any]) -> Record:
        """The record of a sample. files: {suffix: content}. Raises ConfigError that names shard and member."""
        where = f"{shard} member {key}"
        try:
            item = {"id": f"{os.path.basename(shard)}/{key}"} | self._item(files)
            find = _MemberPictures(key, files, len(pictures_of(item)))
            in_parts = re.search(rb'"image(_url)?"\s*:', files.get("json", b""))
            if find.members and not pictures_of(item) and not in_parts:
                item["images"] = list(find.members)
            return make_record(self.form, item, find, where)
        except ConfigError as error:
            raise ConfigError(f"{where} {error}") from None

    def _item(self, files: Mapping[str, Any]) -> dict[str, Any]:
        item = parse_json(decode(files["json"])) if "json" in files else {}
        if not any(item.get(key) is not None for key in FORM_KEYS) and "txt" in files:
            item["caption"] = decode(files["txt"]).rstrip("\r\n")
        if not item:
            has = ", ".join(f".{suffix}" for suffix in files if not suffix.startswith("__"))
            raise ConfigError(f"has {has}, and neither .json nor .txt. A sample has a picture and one of these.")
        return item


class _MemberPictures:
    """Finds the pictures of a sample by the names of its members. A single one is meant whatever its name."""

    def __init__(self, key: str, files: Mapping[str, Any], named: int) -> None:
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


def _samples(shard: str) -> Iterator[dict[str, Any]]:
    import webdataset as wds

    try:
        for sample in wds.tarfile_to_samples(handler=wds.reraise_exception)([{"url": shard}]):
            yield {name: value for name, value in sample.items() if name == "__key__" or not name.startswith("__")}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ConfigError(f"{shard} cannot be read to its end: {error}. Fetch it again.") from error
