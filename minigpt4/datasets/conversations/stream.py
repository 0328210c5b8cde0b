"""Conversations from shards as an endless stream."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from minigpt4.common.errors import ConfigError
from minigpt4.datasets.captions import Incomplete, Unusable
from minigpt4.datasets.conversations.batch import Conversation
from minigpt4.datasets.conversations.dataset import collate, to_training_sample, usable_conversations
from minigpt4.datasets.conversations.record import Record
from minigpt4.datasets.conversations.shards import PICTURES, ShardRecords, record_of
from minigpt4.datasets.datasets.shard_stream import ShardStream
from minigpt4.datasets.datasets.tar_reader import Group, member_id
from minigpt4.datasets.pictures import load_picture
from minigpt4.datasets.splits import Share, content_identity


class RawRecord(NamedTuple):
    """A record in the shuffle buffer, its pictures not decoded yet."""

    shard: str
    key: str
    record: Record
    size: int  # bytes in the tar


class ConversationStream(ShardStream):
    """A `ShardStream` of the items of `ConversationDataset`.

    Records with a mistake, or with a text or picture that cannot be used, are left out. `share` draws by the record's
    own id, or by the content of its pictures, or by its texts if it has none.
    """

    MEMBERS = PICTURES
    SEVERAL_PICTURES = True
    collater = staticmethod(collate)

    def __init__(self, records: ShardRecords, vis_processor: Callable, name: str, share: Share | None = None) -> None:
        super().__init__(records.shards, name, share)
        self.form = records.form
        self._load_picture = partial(load_picture, vis_processor=vis_processor)

    def raw_sample(self, shard: str, group: Group) -> RawRecord:
        if not group.has_text:
            raise Incomplete("a sample without text (.json or .txt)")
        where = f"{shard} member {group.key}"
        try:
            record = record_of(self.form, shard, group, where)
        except ConfigError as mistake:
            if group.final:
                raise Unusable("a record with a mistake") from ConfigError(f"{where} {mistake}")
            raise Incomplete("a record that is not complete") from None
        if not (group.final or record.pictures):
            raise Incomplete("a sample without picture")
        return RawRecord(shard, group.key, record, group.size)

    def identity(self, sample: RawRecord) -> str:
        record = sample.record
        if record.id != member_id(sample.shard, sample.key):
            return record.id
        texts = repr([message.parts for message in record.messages]).encode()
        return content_identity(b"".join(record.pictures) or texts)

    def texts(self) -> Iterator[tuple[str, Conversation]]:
        """(id, conversation) of the records whose texts can be used, in the order of the shards."""
        return usable_conversations(sample.record for sample in self.raw_samples(self.shards))

    def decode(self, sample: RawRecord) -> dict[str, Any]:
        return to_training_sample(sample.record, self._load_picture)
