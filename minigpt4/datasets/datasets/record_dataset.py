"""Datasets with a length, of records whose pictures are files: what all of them have in common."""

from collections import Counter
from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, Self

import numpy as np
from torch.utils.data import Dataset

from minigpt4.common.errors import ConfigError, UnusableDataError
from minigpt4.common.files import read_regular
from minigpt4.datasets.captions import Unusable
from minigpt4.datasets.datasets.packed_strings import PackedStrings
from minigpt4.datasets.left_out import Tally
from minigpt4.datasets.patience import OutOfReach, Patience, folder_in_reach
from minigpt4.datasets.pictures import BROKEN, load_picture
from minigpt4.datasets.samples import Sample
from minigpt4.datasets.splits import Share


class RecordDataset(Dataset):
    """Records by index. Subclasses define `__len__`, `item` and `where`.

    A record that cannot be used, or whose picture is none or is broken, is left out with a warning, and the next one
    takes its place (as its `image_id` shows). If `MAX_BAD_IN_A_ROW` records in a row are bad, the item raises
    RuntimeError. Files that are out of reach are waited for (`datasets.patience`).

    Args:
        vis_processor: as for `processors.read_picture`.
        name: the dataset's name in the YAML, for messages.
    """

    MAX_BAD_IN_A_ROW = 10

    def __init__(self, vis_processor: Callable, name: str) -> None:
        self.vis_processor, self.name = vis_processor, name
        self.tally = Tally(name)
        self.patience = Patience(self.tally, folder_in_reach)

    def __len__(self) -> int:
        raise NotImplementedError

    def item(self, index: int) -> dict[str, Any]:
        """The sample of a record. Raises Unusable, or ConfigError for a mistake in the record."""
        raise NotImplementedError

    def where(self, index: int) -> str:
        """The file or place of a record, for messages."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        tries = min(self.MAX_BAD_IN_A_ROW, len(self))
        for candidate in range(index, index + tries):
            item = self.item_or_none(candidate % len(self))
            if item is not None:
                return item
        raise UnusableDataError(
            f"datasets.{self.name}: {tries} records in a row, from {self.where(index)} on, cannot be used. The "
            "warnings above say why. Are their pictures really pictures?"
        )

    def item_or_none(self, index: int) -> dict[str, Any] | None:
        """The sample of a record; None, counted as left out, for one that cannot be used."""
        try:
            return Sample(self.item(index), self.where(index))
        except Unusable as cause:
            self.tally.drop(str(cause), self.where(index), str(cause.__cause__ or ""))
        except ConfigError as mistake:
            self.tally.drop("a record with a mistake", self.where(index), str(mistake))
        except OutOfReach as error:
            self.tally.drop("a record in a file that is out of reach", self.where(index), str(error))
        return None

    def take_left_out(self) -> Counter[tuple[str, ...]]:
        """Counts by (cause, place) of the records that this process has left out since the last call."""
        return self.tally.take()

    def load_picture(self, source: str | bytes) -> dict[str, Any]:
        """ "image" and its companions of a picture's path or content. Raises Unusable for what is no picture."""
        try:
            content = source if isinstance(source, bytes) else self.patience.retry(lambda: read_regular(source), source)
        except OSError as error:
            raise Unusable(BROKEN) from error
        return load_picture(content, self.vis_processor)


class CaptionedRecords:
    """The captions of a dataset with a length, beside its pictures or features, and the choice of some of them."""

    FIELDS: tuple[str, ...] = ("image_ids", "captions")
    """The attributes with an entry for each record: `PackedStrings` or arrays."""
    name: str
    image_ids: PackedStrings
    captions: PackedStrings
    tally: Tally
    patience: Patience

    def __len__(self) -> int:
        return len(self.captions)

    def select(self, share: Share | None) -> Self:
        """The records of a share, drawn by `image_id`, with counts of its own. Raises ConfigError for none or all."""
        selected = copy(self)
        selected.tally = Tally(self.name)
        selected.patience = Patience(selected.tally, self.patience.others_in_reach)
        chosen = share.among(self.image_ids, self.name) if share else np.full(len(self), True)
        for name in self.FIELDS:
            field = getattr(self, name)
            setattr(selected, name, field[chosen] if isinstance(field, np.ndarray) else field.select(chosen))
        return selected

    def digest(self) -> str:
        """Identifies the records, in their order, by which a resumed run knows its data."""
        return f"{self.image_ids.digest()}{self.captions.digest()}"

    def texts(self) -> Iterator[tuple[str, str]]:
        """(image id, caption) of the records, in order."""
        yield from zip(self.image_ids, self.captions, strict=True)

    def text_length(self, index: int) -> int:
        """Characters of a caption, for length balancing."""
        return len(self.captions[index])
