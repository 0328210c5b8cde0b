"""A user's own data: conversations about pictures, from files of many formats."""

import logging
from typing import Any

from torch.utils.data import Dataset

from minigpt4.common.registry import registry
from minigpt4.common.text import pluralize
from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from minigpt4.datasets.conversations.dataset import ConversationDataset
from minigpt4.datasets.conversations.formats import Records, read_records
from minigpt4.datasets.conversations.shards import ShardRecords
from minigpt4.datasets.conversations.stream import ConversationStream
from minigpt4.datasets.splits import Share

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
        splits = self.build_splits(info.get("storage"), self._read, self._make)
        if all(isinstance(dataset, ConversationDataset) for dataset in splits.values()) and "val" in splits:
            shared = set(splits["train"].records.ids) & set(splits["val"].records.ids)
            if shared:
                log.warning(
                    "%s: %s of val stand in train, too, e.g. %s. Records that are in both make val look too good.",
                    *(self.name, pluralize(len(shared), "id"), min(shared)),
                )
        return splits

    def _read(self, storage: Any) -> Records | ShardRecords:
        info = self.config.get("build_info") or {}
        format, columns = info.get("format") or "auto", info.get("columns")
        name, records = read_records(storage, info.get("images"), format, columns, self.name)
        if not isinstance(records, ShardRecords):
            log.info("%s: %s, read as %s.", self.name, pluralize(len(records), "record"), name)
        return records

    def _make(self, records: Records | ShardRecords, processors: str, share: Share | None) -> Dataset:
        vis_processor = self.vis_processors[processors]
        if isinstance(records, ShardRecords):
            return ConversationStream(records, vis_processor, self.name, share)
        chosen = records.select(share.among(records.ids, self.name)) if share else records
        return ConversationDataset(chosen, vis_processor, self.name)
