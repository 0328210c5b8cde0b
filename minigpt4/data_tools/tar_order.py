"""The names in a shard: whether the members of each sample follow each other, and which belong to none."""

import tarfile
from collections.abc import Iterator

from minigpt4.data_tools.findings import Finding
from minigpt4.datasets.conversations.pictures import SUFFIXES
from minigpt4.datasets.datasets.shards import is_local
from minigpt4.datasets.datasets.tar_reader import TEXT_SUFFIXES, is_hidden, split_name

PICTURES = [suffix.removeprefix(".") for suffix in SUFFIXES]


def look_at_names(shard: str) -> Iterator[Finding]:
    """What is wrong with the order and the names of a shard's members, as far as it can be read.

    URLs and commands are not looked at: they would be fetched twice.
    """
    if not is_local(shard):
        return
    seen: dict[str, set[str]] = {}
    last, returned = None, []
    for name in _names(shard):
        key, suffix = split_name(name, PICTURES)
        if key in seen and key != last:
            returned.append(name)
        seen.setdefault(key, set()).add(suffix)
        last = key
    if returned:
        yield Finding("unsorted", shard, f"{returned[0]} does not follow the other members of its sample")
    for key, suffixes in seen.items():
        if not suffixes & {*PICTURES, *TEXT_SUFFIXES}:
            yield Finding("orphan", f"{shard} member {key}", f"it has {', '.join('.' + s for s in sorted(suffixes))}")


def _names(shard: str) -> Iterator[str]:
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                tar.members = []  # or it would keep them all
                if member.isreg() and not is_hidden(member.name):
                    yield member.name
    except (tarfile.TarError, OSError, EOFError):
        return  # whoever reads the samples reports it
