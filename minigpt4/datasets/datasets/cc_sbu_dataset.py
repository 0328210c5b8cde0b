"""cc_sbu_align, the well-written descriptions of stage 2, and any other folder of the same form."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from minigpt4.common import first_release
from minigpt4.common.errors import ConfigError
from minigpt4.common.files import read_regular
from minigpt4.common.text import pluralize
from minigpt4.datasets.captions import Unusable, load_json, usable
from minigpt4.datasets.datasets.packed_strings import PackedStrings
from minigpt4.datasets.datasets.record_dataset import CaptionedRecords, RecordDataset
from minigpt4.weights import locate

__getattr__ = first_release.attributes_of(__name__)  # for names that are gone

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
FORM = 'Expected {"annotations": [{"image_id": "2", "caption": "…"}, …]}.'


class Record(NamedTuple):
    """A record whose picture is not read yet."""

    index: int
    key: str
    image_id: str
    caption: str


class CCSBUAlignDataset(CaptionedRecords, RecordDataset):
    """The records of `<storage>/filter_cap.json` with the pictures `<storage>/image/<image_id>.jpg` (.jpeg .png .webp).

    filter_cap.json: `{"annotations": [{"image_id": "2", "caption": "…"}, …]}`. Captions are used unchanged. Records
    without an id or a usable caption (`datasets.captions`) are left out, and counted in `unusable`.
    Item: `{"image": …, "text_input": str, "image_id": str}`; `to_sample` makes "image" and its companions.

    `cache-features` reads the records part by part (`common.contracts.CacheableDataset`).
    """

    RECORDS_PER_PART = 1000
    FIELDS = ("image_ids", "captions", "files")

    def __init__(self, storage: str, vis_processor: Callable[[Image.Image], Any], name: str = "cc_sbu_align") -> None:
        """name: the dataset's name in the YAML, for messages.

        Raises FileNotFoundError for a missing folder, filter_cap.json or picture, ConfigError for a malformed record.
        """
        super().__init__(vis_processor, name)
        storage = os.path.expanduser(str(storage))
        self.annotation_file = os.path.join(storage, "filter_cap.json")
        self.image_folder = os.path.join(storage, "image")
        paths = (storage, self.annotation_file, self.image_folder)
        missing = next((path for path in paths if not os.path.exists(path)), None)
        if missing:
            key = f"datasets.{name}.build_info.storage"
            raise FileNotFoundError(
                f"{key}={storage}: there is no {missing}. Set it in the YAML or with --options {key}=/data/{name}"
            )
        image_ids, captions, self.unusable = read_annotations(self.annotation_file)
        for cause, count in self.unusable.items():
            log.warning("%s: left out %s of %s: %s.", name, pluralize(count, "record"), self.annotation_file, cause)
        self.files = PackedStrings(self._find_pictures(image_ids))
        self.image_ids = PackedStrings(image_ids)
        self.captions = PackedStrings(captions)
        log.info("%s: %s.", name, pluralize(len(self), "record"))

    def item(self, index: int) -> dict[str, Any]:
        fields = self.load_picture(self.where(index))
        return fields | {"text_input": self.captions[index], "image_id": self.image_ids[index]}

    def where(self, index: int) -> str:
        return os.path.join(self.image_folder, self.files[index])

    @property
    def num_parts(self) -> int:
        return -(-len(self) // self.RECORDS_PER_PART)

    def part(self, number: int) -> Iterator[Record]:
        """The records of a part, in order."""
        for index in range(len(self))[number * self.RECORDS_PER_PART :][: self.RECORDS_PER_PART]:
            yield Record(index, f"{index:09d}", self.image_ids[index], self.captions[index])

    def load(self, record: Record) -> dict[str, Any] | None:
        """The item of a record; None, with a warning, for one whose picture cannot be read."""
        return self.item_or_none(record.index)

    def _find_pictures(self, image_ids: list[str]) -> list[str]:
        """The file name of every record."""
        by_stem = list_pictures(self.image_folder)
        missing = [image_id for image_id in image_ids if image_id not in by_stem]
        if missing:
            raise FileNotFoundError(
                f"datasets.{self.name}: {len(missing)} of {len(image_ids)} records have no picture, e.g. "
                f"{os.path.join(self.image_folder, missing[0])}{{{','.join(SUFFIXES)}}}. "
                f"Add them, or take these records out of {self.annotation_file}."
            )
        return [by_stem[image_id] for image_id in image_ids]


def list_pictures(folder: str) -> dict[str, str]:
    """{image_id: file name} of the pictures in a folder, from one listing."""
    names = sorted(os.listdir(folder))
    by_stem: dict[str, str] = {}
    for suffix in SUFFIXES:
        for name in names:
            stem, own_suffix = os.path.splitext(name)
            if own_suffix.lower() == suffix:
                by_stem.setdefault(stem, name)
    return by_stem


def load_annotations(path: str) -> list[Any]:
    """The records of a filter_cap.json, as they are. Raises ConfigError that names a file without a list of them."""
    try:
        content = load_json(read_regular(path))
    except Unusable as error:
        reason = locate.why_unreadable(Path(path)) or error.__cause__ or error
        raise ConfigError(f"{path} is not JSON in UTF-8: {reason}. {FORM}") from error
    records = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(records, list) or not records:
        raise ConfigError(f"{path} has no records under the key 'annotations'. {FORM}")
    return records


def read_annotations(path: str) -> tuple[list[str], list[str], Counter[str]]:
    """Image ids and captions of a filter_cap.json, and counts by cause of the records that cannot be used.

    Raises ConfigError that names the file, also if no record can be used.
    """
    records = load_annotations(path)
    image_ids, captions, unusable = [], [], Counter()
    for record in records:
        try:
            if not isinstance(record, dict) or not isinstance(record.get("image_id"), str | int):
                raise Unusable("a record without 'image_id' that is a string or a whole number")
            captions.append(usable(record.get("caption")))
            image_ids.append(str(record["image_id"]))
        except Unusable as cause:
            unusable[str(cause)] += 1
    if not captions:
        raise ConfigError(f"{path}: annotations[0] cannot be used ({next(iter(unusable))}), nor any other. {FORM}")
    return image_ids, captions, unusable
