"""Conversations about pictures as training samples."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch.utils.data import default_collate

from minigpt4.datasets.captions import Unusable, usable
from minigpt4.datasets.conversations.batch import Conversation, Conversations
from minigpt4.datasets.conversations.formats import Records
from minigpt4.datasets.conversations.record import Picture, Record
from minigpt4.datasets.datasets.record_dataset import RecordDataset


class ConversationDataset(RecordDataset):
    """The records of a user's files.

    Item: {"text_input": `batch.Conversation`, "image_id": the record's id, "pictures": [`to_sample(…)` of each]}.
    Records with a text that cannot be trained on (`datasets.captions`) are left out.
    """

    def __init__(self, records: Records, vis_processor: Callable, name: str) -> None:
        super().__init__(vis_processor, name)
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def item(self, index: int) -> dict[str, Any]:
        record = self.patience.retry(lambda: self.records[index], self.where(index))
        return to_training_sample(record, self.load_picture)

    def where(self, index: int) -> str:
        return self.records.where(index)

    def digest(self) -> str:
        """Identifies the records, in their order, by which a resumed run knows its data."""
        return self.records.digest

    def texts(self) -> Iterator[tuple[str, Conversation]]:
        """(id, conversation) of the records whose texts can be used, in order."""
        return usable_conversations(self.records)

    def text_length(self, index: int) -> int:
        """Characters of a conversation, for length balancing."""
        return int(self.records.text_lengths[index])

    def collater(self, samples: list[Mapping[str, Any]]) -> dict[str, Any]:
        return collate(samples)


def to_training_sample(record: Record, load_picture: Callable[[str | bytes], dict[str, Any]]) -> dict[str, Any]:
    """The item of a record. Raises Unusable for a text or a picture that cannot be trained on."""
    return {
        "text_input": conversation_of(record),
        "image_id": record.id,
        "pictures": [load_picture(source) for source in record.pictures],
    }


def collate(samples: list[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch: "text_input" `Conversations`, and the pictures of all of them, in order, "image" [images,3,S,S]."""
    pictures = [picture for sample in samples for picture in sample["pictures"]]
    return {
        "text_input": Conversations(sample["text_input"] for sample in samples),
        "image_id": [sample["image_id"] for sample in samples],
        **(default_collate(pictures) if pictures else {"image": torch.empty(0, 3, 0, 0)}),
    }


def conversation_of(record: Record) -> Conversation:
    """The messages of a record with None in the place of each picture. Raises Unusable for a text that is none.

    Blank texts beside others or a picture are left out.
    """
    return tuple((message.role, _parts(message.parts)) for message in record.messages)


def usable_conversations(records: Iterable[Record]) -> Iterator[tuple[str, Conversation]]:
    """(id, conversation) of the records whose texts can be used. No picture is opened."""
    for record in records:
        with suppress(Unusable):
            yield record.id, conversation_of(record)


def _parts(parts: Sequence[str | Picture]) -> tuple[str | None, ...]:
    kept = [part for part in parts if isinstance(part, Picture) or part.strip()] or parts
    return tuple(None if isinstance(part, Picture) else usable(part) for part in kept)
