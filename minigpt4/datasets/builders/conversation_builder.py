"""A user's own data: conversations about pictures, from files of many formats."""

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.common.text import pluralize
from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from minigpt4.datasets.conversations.dataset import ConversationDataset
from minigpt4.datasets.conversations.formats import read_records
from minigpt4.datasets.conversations.record import Record
from minigpt4.datasets.conversations.shards import ShardRecords
from minigpt4.datasets.conversations.stream import ConversationStream

log = logging.getLogger(__name__)

KEYS = ("storage", "images", "format", "columns", "val")


@registry.register_builder("conversation")
class ConversationBuilder(BaseDatasetBuilder):
    """Builds the split "train" from `build_info.storage`, and "val" from the share or the files `build_info.val`.

    Texts are used as they are; there is no text processor.
    """

    name = "conversation"

    def build(self) -> dict[str, Dataset]:
        info = self.config.get("build_info") or {}
        self.check_keys("build_info", info, KEYS)
        records, val = self._read(info.get("storage")), info.get("val")
        if isinstance(val, float | int):
            records, others = self._split(records, val)
        else:
            others = self._read(val) if val else None
        train, eval = self.vis_processors["train"], self.vis_processors["eval"]
        if isinstance(records, ShardRecords):
            splits: dict[str, Dataset] = {"train": ConversationStream(records, train, self.name)}
        else:
            splits = {"train": ConversationDataset(records, train, self.name)}
        if others is not None:
            splits["val"] = ConversationDataset(others, eval, self.name)
            log.info("%s: %s in the split val.", self.name, pluralize(len(others), "record"))
        return splits

    def _read(self, storage: Any) -> Sequence[Record] | ShardRecords:
        info = self.config.get("build_info") or {}
        storage = storage if isinstance(storage, str) else list(storage or [])
        format, columns = info.get("format") or "auto", info.get("columns")
        name, records = read_records(storage, info.get("images"), format, columns, self.name)
        if not isinstance(records, ShardRecords):
            log.info("%s: %s, read as %s.", self.name, pluralize(len(records), "record"), name)
        return records

    def _split(self, records: Sequence[Record] | ShardRecords, share: float) -> tuple[Sequence[Record], ...]:
        """The records without a share, and the share. A record's id alone decides: added records change no other's."""
        key = f"datasets.{self.name}.build_info.val"
        if isinstance(records, ShardRecords):
            raise ConfigError(f"{key}={share}: a stream of shards cannot be divided. Name the files of val instead.")
        if not 0 < share < 1:
            raise ConfigError(f"{key}={share} must be more than 0 and less than 1, or name files.")
        chosen = np.array([in_share(id, share) for id in records.ids], dtype=bool)
        if chosen.all() or not chosen.any():
            none_or_all = "all" if chosen.all() else "none"
            what = f"{none_or_all} of {len(records)} records would be in val"
            raise ConfigError(f"{key}={share}: {what}. Change the share.")
        return Selection(records, ~chosen), Selection(records, chosen)


class Selection(Sequence[Record]):
    """The records at which `chosen` is true."""

    def __init__(self, records: Sequence[Record], chosen: np.ndarray) -> None:
        self.records, self.indices = records, np.flatnonzero(chosen)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.records[int(self.indices[index])]


def in_share(id: str, share: float) -> bool:
    """Whether a record with this id belongs to a share (0 to 1) of all records."""
    digest = hashlib.sha256(id.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
