"""Conversations from shards as an endless stream."""

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from minigpt4.common.errors import ConfigError
from minigpt4.common.text import pluralize
from minigpt4.datasets.captions import Unusable
from minigpt4.datasets.conversations.batch import Conversation
from minigpt4.datasets.conversations.dataset import collate, to_training_sample, usable_conversations
from minigpt4.datasets.conversations.record import Record
from minigpt4.datasets.conversations.shards import ShardRecords
from minigpt4.datasets.left_out import Gate
from minigpt4.datasets.seeding import derive_seed

log = logging.getLogger(__name__)


class ConversationStream(IterableDataset):
    """The records of shards, drawn with replacement and shuffled in a buffer, as items of `ConversationDataset`.

    The stream is a function of (seed, epoch, rank, worker). Records with a mistake, or with a text or picture that
    cannot be used, are left out and counted; if nearly all are, iteration raises RuntimeError.
    """

    collater = staticmethod(collate)

    def __init__(self, records: ShardRecords, vis_processor: Callable, name: str, shuffle_buffer: int = 1000) -> None:
        self.records, self.vis_processor, self.name, self.shuffle_buffer = records, vis_processor, name, shuffle_buffer
        self.read, self.decoded = (Gate(name, len(records.shards)) for _ in range(2))
        self.epoch = 0
        self.set_seed(0)
        log.info("%s: streaming %s.", name, pluralize(len(records.shards), "shard"))

    def set_seed(self, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """Set the seed and the rank. Each rank draws its own shards, so their number does not matter here."""
        self.seed, self.rank = seed, rank

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next `iter`."""
        self.epoch = epoch

    def take_left_out(self) -> Counter[tuple[str, ...]]:
        """Counts by (cause, place) of the records that this process has left out since the last call."""
        return self.read.take() + self.decoded.take()

    def texts(self) -> Iterator[tuple[str, Conversation]]:
        """(id, conversation) of the records whose texts can be used, in the order of the shards."""
        return usable_conversations(record for shard in self.records.shards for record in self._read(shard))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        seed = derive_seed(self.seed, self.epoch, self.rank, worker.id if worker else 0)
        rng = random.Random(seed)
        self.read.open_window()
        self.decoded.open_window()
        drawn = (rng.choice(self.records.shards) for _ in count())
        shuffle = wds.shuffle(self.shuffle_buffer, initial=self.shuffle_buffer, seed=derive_seed(seed, "shuffle"))
        return self._samples(shuffle(record for shard in drawn for record in self._read(shard)))

    def _read(self, shard: str) -> Iterator[Record]:
        """The records of a shard that have no mistake."""
        self.read.check()
        self.decoded.check()
        records = self.records.read(shard)
        while True:
            try:
                record = next(records)
            except StopIteration:
                return
            except ConfigError as error:
                self.read.drop("a record with a mistake", shard, str(error))
                continue
            self.read.keep()
            yield record

    def _samples(self, records: Iterator[Record]) -> Iterator[dict[str, Any]]:
        for record in records:
            try:
                sample = to_training_sample(record, self.vis_processor)
            except Unusable as cause:
                self.decoded.drop(str(cause), record.where, str(cause.__cause__ or ""))
                continue
            self.decoded.keep()
            yield sample
