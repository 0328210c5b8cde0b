"""cc_sbu_align, the well-written descriptions of stage 2, and any other folder of the same form."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from minigpt4.common.errors import ConfigError
from minigpt4.common.files import read_regular
from minigpt4.common.text import pluralize
from minigpt4.datasets.captions import Unusable, load_json, usable
from minigpt4.datasets.datasets.packed_strings import PackedStrings
from minigpt4.datasets.left_out import Tally
from minigpt4.datasets.patience import Patience
from minigpt4.processors import read_picture, to_sample
from minigpt4.weights import locate

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Record(NamedTuple):
    """A record whose picture is not read yet."""

    index: int
    key: str
    image_id: str
    caption: str


class CCSBUAlignDataset(Dataset):
    """The records of `<storage>/filter_cap.json` with the pictures `<storage>/image/<image_id>.jpg` (.jpeg .png .webp).

    filter_cap.json: `{"annotations": [{"image_id": "2", "caption": "…"}, …]}`. Captions are used unchanged. Records
    without a usable one (`datasets.captions`) are left out, and counted in `unusable`.
    Item: `{"image": …, "text_input": str, "image_id": str}`; `to_sample` makes "image" and its companions. A file that
    is no picture, or a broken one, is left out with a warning, and the next record takes its place (as its `image_id`
    shows). If `MAX_BAD_IN_A_ROW` records in a row are bad, the item raises RuntimeError. Files that are out of reach
    are waited for (`datasets.patience`).

    `cache-features` reads the records part by part (`common.contracts.CacheableDataset`).
    """

    MAX_BAD_IN_A_ROW = 10
    RECORDS_PER_PART = 1000

    def __init__(self, storage: str, vis_processor: Callable[[Image.Image], Any], name: str = "cc_sbu_align") -> None:
        """name: the dataset's name in the YAML, for messages.

        Raises FileNotFoundError for a missing folder, filter_cap.json or picture, ConfigError for a malformed record.
        """
        self.name = name
        self.vis_processor = vis_processor
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
        self.tally = Tally(name)
        self.patience = Patience(self.tally, self._folder_in_reach)
        log.info("%s: %s.", name, pluralize(len(self), "record"))

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        tries = min(self.MAX_BAD_IN_A_ROW, len(self))
        for candidate in range(index, index + tries):
            candidate %= len(self)
            fields = self._load(candidate)
            if fields is not None:
                return fields | {"text_input": self.captions[candidate], "image_id": self.image_ids[candidate]}
        raise RuntimeError(
            f"datasets.{self.name}: the pictures of {tries} records in a row, from annotations[{index}] on, cannot be "
            f"read, e.g. {self._path(index)}. Are these files really pictures?"
        )

    def digest(self) -> str:
        """Identifies the records, in their order, by which a resumed run knows its data."""
        return f"{self.image_ids.digest()}{self.captions.digest()}"

    def texts(self) -> Iterator[tuple[str, str]]:
        """(image id, caption) of the records, in order."""
        yield from zip(self.image_ids, self.captions, strict=True)

    def text_length(self, index: int) -> int:
        """Characters of a caption, for length balancing."""
        return len(self.captions[index])

    def take_left_out(self) -> Counter[tuple[str, ...]]:
        """Counts by (cause, file) of the pictures that this process has left out since the last call."""
        return self.tally.take()

    @property
    def num_parts(self) -> int:
        return -(-len(self) // self.RECORDS_PER_PART)

    def part(self, number: int) -> Iterator[Record]:
        """The records of a part, in order."""
        for index in range(len(self))[number * self.RECORDS_PER_PART :][: self.RECORDS_PER_PART]:
            yield Record(index, f"{index:09d}", self.image_ids[index], self.captions[index])

    def load(self, record: Record) -> dict[str, Any] | None:
        """ "image" and its companions; None, with a warning, for a picture that cannot be read."""
        return self._load(record.index)

    def _path(self, index: int) -> str:
        return os.path.join(self.image_folder, self.files[index])

    def _load(self, index: int) -> dict[str, Any] | None:
        path = self._path(index)
        try:
            content = self.patience.retry(lambda: read_regular(path), path)
            picture = read_picture(content, self.vis_processor)
        except Exception as error:  # Pillow's plug-ins raise nearly every kind of error on broken files
            self.tally.drop("an image that is not one, or is broken", path, str(error))
            return None
        return to_sample(self.vis_processor, picture)

    def _folder_in_reach(self, path: str) -> bool:
        with suppress(OSError), os.scandir(self.image_folder) as entries:
            return next(entries, None) is not None
        return False

    def _find_pictures(self, image_ids: list[str]) -> list[str]:
        """The file name of every record, from one listing of the folder."""
        names = sorted(os.listdir(self.image_folder))
        by_stem: dict[str, str] = {}
        for suffix in SUFFIXES:
            for name in names:
                stem, own_suffix = os.path.splitext(name)
                if own_suffix.lower() == suffix:
                    by_stem.setdefault(stem, name)
        missing = [image_id for image_id in image_ids if image_id not in by_stem]
        if missing:
            raise FileNotFoundError(
                f"datasets.{self.name}: {len(missing)} of {len(image_ids)} records have no picture, e.g. "
                f"{os.path.join(self.image_folder, missing[0])}{{{','.join(SUFFIXES)}}}. "
                f"Add them, or take these records out of {self.annotation_file}."
            )
        return [by_stem[image_id] for image_id in image_ids]


def read_annotations(path: str) -> tuple[list[str], list[str], Counter[str]]:
    """Image ids and captions of a filter_cap.json, and counts by cause of the records without a usable caption.

    Raises ConfigError that names the file and the place, also if no caption is usable.
    """
    form = 'Expected {"annotations": [{"image_id": "2", "caption": "…"}, …]}.'
    try:
        content = load_json(read_regular(path))
    except Unusable as error:
        reason = locate.why_unreadable(Path(path)) or error.__cause__ or error
        raise ConfigError(f"{path} is not JSON in UTF-8: {reason}. {form}") from error
    records = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(records, list) or not records:
        raise ConfigError(f"{path} has no records under the key 'annotations'. {form}")
    image_ids, captions, unusable = [], [], Counter()
    for number, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("image_id"), str | int):
            raise ConfigError(
                f"{path}: annotations[{number}] has no 'image_id' that is a string or a whole number. {form}"
            )
        try:
            captions.append(usable(record.get("caption")))
        except Unusable as cause:
            unusable[str(cause)] += 1
        else:
            image_ids.append(str(record["image_id"]))
    if not captions:
        problem = next(iter(unusable))
        raise ConfigError(f"{path}: annotations[0] has no 'caption' that can be used ({problem}). {form}")
    return image_ids, captions, unusable
