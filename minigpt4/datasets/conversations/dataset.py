"""Conversations about pictures as training samples."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from minigpt4.datasets.captions import Unusable, usable
from minigpt4.datasets.conversations.batch import Conversation, Conversations
from minigpt4.datasets.conversations.record import Picture, Record
from minigpt4.datasets.left_out import Tally
from minigpt4.processors import read_picture, to_sample

log = logging.getLogger(__name__)


class ConversationDataset(Dataset):
    """The records of a user's files.

    Item: {"text_input": `batch.Conversation`, "image_id": the record's id, "pictures": [`to_sample(…)` of each]}.
    A record with a text that cannot be trained on (`datasets.captions`), or with a picture that cannot be read, is left
    out and counted, and the next record takes its place. If `MAX_BAD_IN_A_ROW` records in a row are bad, the item
    raises RuntimeError.

    Args:
        records: the records, or those of one split.
        vis_processor: as for `processors.read_picture`.
        name: the dataset's name in the YAML, for messages.
    """

    MAX_BAD_IN_A_ROW = 10

    def __init__(self, records: Sequence[Record], vis_processor: Callable, name: str) -> None:
        self.records, self.vis_processor, self.name = records, vis_processor, name
        self.tally = Tally(name)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        tries = min(self.MAX_BAD_IN_A_ROW, len(self))
        for candidate in range(index, index + tries):
            record = self.records[candidate % len(self)]
            try:
                return to_training_sample(record, self.vis_processor)
            except Unusable as cause:
                self.tally.drop(str(cause), record.where, str(cause.__cause__ or ""))
        raise RuntimeError(
            f"datasets.{self.name}: {tries} records in a row, from {self.records[index].where} on, cannot be used. The "
            "warnings above say why."
        )

    def texts(self) -> Iterator[tuple[str, Conversation]]:
        """(id, conversation) of the records whose texts can be used, in order."""
        return usable_conversations(self.records)

    def text_length(self, index: int) -> int:
        """Characters of a conversation, for length balancing."""
        return sum(len(part) for m in self.records[index].messages for part in m.parts if isinstance(part, str))

    def collater(self, samples: list[Mapping[str, Any]]) -> dict[str, Any]:
        return collate(samples)

    def take_left_out(self) -> Counter[tuple[str, ...]]:
        """Counts by (cause, place) of the records that this process has left out since the last call."""
        return self.tally.take()


def to_training_sample(record: Record, vis_processor: Callable) -> dict[str, Any]:
    """The item of a record. Raises Unusable for a text or a picture that cannot be trained on."""
    sources = [part.source for message in record.messages for part in message.parts if isinstance(part, Picture)]
    return {
        "text_input": conversation_of(record),
        "image_id": record.id,
        "pictures": [_read(source, vis_processor) for source in sources],
    }


def collate(samples: list[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch: "text_input" `Conversations`, and the pictures of all of them, in order, "image" [images,3,S,S]."""
    pictures = [picture for sample in samples for picture in sample["pictures"]]
    return {
        "text_input": Conversations(sample["text_input"] for sample in samples),
        "image_id": [sample["image_id"] for sample in samples],
        **(default_collate(pictures) if pictures else {"image": torch.empty(0, 3, 0, 0)}),
    }


def _read(source: str | bytes, vis_processor: Callable) -> dict[str, Any]:
    try:
        content = Path(source).read_bytes() if isinstance(source, str) else source
        return to_sample(vis_processor, read_picture(content, vis_processor))
    except Exception as error:  # Pillow's plug-ins raise nearly every kind of error on broken files
        raise Unusable("an image that is not one, or is broken") from error


def conversation_of(record: Record) -> Conversation:
    """The messages of a record with None in the place of each picture. Raises Unusable for a text that is none.

    Blank texts beside a picture are left out.
    """
    return tuple((message.role, _parts(message.parts)) for message in record.messages)


def usable_conversations(records: Iterable[Record]) -> Iterator[tuple[str, Conversation]]:
    """(id, conversation) of the records whose texts can be used. No picture is opened."""
    for record in records:
        with suppress(Unusable):
            yield record.id, conversation_of(record)


def _parts(parts: Sequence[str | Picture]) -> tuple[str | None, ...]:
    pictured = any(isinstance(part, Picture) for part in parts)
    kept = [part for part in parts if isinstance(part, Picture) or part.strip() or not pictured]
    return tuple(None if isinstance(part, Picture) else usable(part) for part in kept)
