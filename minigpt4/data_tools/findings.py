"""The kinds of things that are found in data, and how bad each is."""

from dataclasses import dataclass
from typing import NamedTuple

ERROR, WARNING, NOTE = "error", "warning", "note"


class Kind(NamedTuple):
    """A kind of finding; its name for one, and for several."""

    level: str
    one: str
    several: str


KINDS = {
    "nothing": Kind(ERROR, "dataset without a usable sample", "datasets without a usable sample"),
    "shard": Kind(ERROR, "shard that cannot be read whole", "shards that cannot be read whole"),
    "empty_shard": Kind(ERROR, "shard without a usable sample", "shards without a usable sample"),
    "mistake": Kind(ERROR, "record with a mistake", "records with a mistake"),
    "text": Kind(ERROR, "text that cannot be learnt", "texts that cannot be learnt"),
    "left_out": Kind(ERROR, "sample that training leaves out", "samples that training leaves out"),
    "picture": Kind(ERROR, "picture that cannot be read", "pictures that cannot be read"),
    "no_label": Kind(ERROR, "sample of which nothing is learnt", "samples of which nothing is learnt"),
    "doubled": Kind(WARNING, "record that is there twice", "records that are there twice"),
    "doubled_id": Kind(WARNING, "id that another record has, too", "ids that other records have, too"),
    "copy": Kind(WARNING, "picture that is nearly like another", "pictures that are nearly like others"),
    "blurred": Kind(WARNING, "blurred picture", "blurred pictures"),
    "flat": Kind(WARNING, "picture of one colour", "pictures of one colour"),
    "cut": Kind(WARNING, "sample that is cut at max_txt_len", "samples that are cut at max_txt_len"),
    "unsorted": Kind(WARNING, "shard whose members are not in order", "shards whose members are not in order"),
    "orphan": Kind(WARNING, "member that belongs to no sample", "members that belong to no sample"),
    "broken_up": Kind(NOTE, "text with markers of the prompt", "texts with markers of the prompt"),
    "no_picture": Kind(NOTE, "record without picture", "records without picture"),
}


class Place(NamedTuple):
    """Where a picture is found again."""

    part: int
    item: int
    """Number of its record among the records and faults of the part."""
    number: int
    """Its number among the pictures of the record."""


@dataclass
class Finding:
    """Something that was found at one place."""

    kind: str
    """A key of KINDS."""
    where: str
    what: str = ""
    badness: float = 0.0
    """The findings of a kind are shown in this order, the highest first."""
    picture: Place | None = None
    like: Place | None = None
    """Another picture, which this one is like."""

    @property
    def level(self) -> str:
        return KINDS[self.kind].level
