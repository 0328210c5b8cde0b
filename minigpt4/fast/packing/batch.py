"""Packed batches: sequences of different lengths end to end in one row, so that no work is spent twice or in vain.

- No padding, save some rows at the end.
- What all sequences begin with, up to their first image (`<s>`, the prompt), stands in the row once, as a sequence of
  its own. Its keys and values precede those of each other sequence.
- The last token of a sequence is left out. It is predicted, but nothing is predicted from it.

A long row is cut into pieces, each with whole sequences and a beginning of its own. The language model takes them one
by one, and has to hold no more than one.

Attention keeps the sequences apart: it is told where each begins (`Segments`) and is causal within it. Kernels of our
own do that on a GPU in 16 bit (`packed_kernels.py`); elsewhere a loop over the sequences, good enough for tests.

B sequences, P tokens that they share, T rows of a piece, N image vectors, K labels, D width.
"""

from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from minigpt4.fast.attention import Segments
from minigpt4.fast.packing.binning import ROW_MULTIPLE, divide, round_up
from minigpt4.models.prompt import IGNORE_INDEX, IMAGE_ID

# Sizes are rounded up to multiples of these, so that few different ones occur: each has a CUDA graph of its own.
LABEL_MULTIPLE, IMAGE_MULTIPLE, SEQUENCE_MULTIPLE, LONGEST_MULTIPLE = 128, 256, 8, 64
# Sequences that the fill is divided into, so that it does not have the longest one.
FILLS = 4


class Sizes(NamedTuple):
    """Lengths of the parts of a piece: all that its shapes depend on."""

    rows: int
    image_vectors: int
    sequences: int
    shared: int
    labels: int
    longest: int


@dataclass
class MicroBatch:
    """B sequences in one row of T tokens, filled up by some more that nothing is learnt from.

    All numbers lie in one tensor [..] int64, so that they travel to the GPU, and into a CUDA graph, in one copy.
    """

    numbers: torch.Tensor
    sizes: Sizes

    def _parts(self) -> tuple[torch.Tensor, ...]:
        """In the order of `_piece`."""
        rows, images, sequences, _, labels, _ = self.sizes
        return self.numbers.split([rows, rows, images, images, labels, labels, sequences + FILLS + 2])

    @property
    def input_ids(self) -> torch.Tensor:
        """[1,T], 0 where an image vector belongs."""
        return self._parts()[0].unsqueeze(0)

    @property
    def targets(self) -> torch.Tensor:
        """[1,K] the tokens to be predicted at `logits_to_keep`, IGNORE_INDEX in the fill."""
        return self._parts()[5].unsqueeze(0)

    def insert(self, embeds: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """The rows [1,T,D], with those of the whole batch's image vectors [all,D] that belong here in their places."""
        _, _, places, which, *_ = self._parts()
        return embeds.index_copy(1, places, vectors.index_select(0, which).unsqueeze(0))

    def llm_inputs(self) -> dict:
        """What the language model is called with beside the embeddings [1,T,D]; see `allow_packing`."""
        _, positions, _, _, label_rows, _, starts = self._parts()
        return {
            # transformers takes a mask of four dimensions as it is; the packed attention does not look at it.
            "attention_mask": self.numbers.view(1, 1, 1, -1),
            "position_ids": positions.unsqueeze(0),
            "segments": Segments(starts.int(), self.sizes.shared, self.sizes.longest),
            "logits_to_keep": label_rows,
        }

    def to(self, device: torch.device, non_blocking: bool = False) -> "MicroBatch":
        return replace(self, numbers=self.numbers.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "MicroBatch":
        return replace(self, numbers=self.numbers.pin_memory())


@dataclass
class PackedBatch:
    """The sequences of a batch, in pieces."""

    pieces: list[MicroBatch]
    num_labels: int
    num_tokens: int  # of the sequences, those included that are shared or left out
    num_image_vectors: int

    def to(self, device: torch.device, non_blocking: bool = False) -> "PackedBatch":
        return replace(self, pieces=[piece.to(device, non_blocking) for piece in self.pieces])

    def pin_memory(self) -> "PackedBatch":
        return replace(self, pieces=[piece.pin_memory() for piece in self.pieces])

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        for piece in self.pieces:
            piece.numbers.record_stream(stream)


def pack(sequences: list[list[int]], labels: list[list[int]], tokens_per_micro_batch: int) -> PackedBatch:
    """Pack token ids (IMAGE_ID where an image vector belongs) and their labels, of the same lengths, not shifted.

    tokens_per_micro_batch: the most that a piece has, but for a longer sequence.
    """
    shared = shared_beginning(sequences, labels)
    # An image vector is never left out: the batch has a place for each.
    ends = [len(ids) - (ids[-1:] != [IMAGE_ID]) if ids else 0 for ids in sequences]
    vectors = np.cumsum([0, *(ids.count(IMAGE_ID) for ids in sequences)])
    pieces = []
    for group in divide([end - shared for end in ends], shared, tokens_per_micro_batch):
        rows = [slice(shared, ends[i]) for i in group]
        own = [sequences[i][part] for i, part in zip(group, rows, strict=True)]
        predicted = [[*labels[i][1:], IGNORE_INDEX][part] for i, part in zip(group, rows, strict=True)]
        which = np.concatenate([np.arange(vectors[i], vectors[i + 1]) for i in group])
        pieces.append(_piece(sequences[0][:shared], own, predicted, which))
    return PackedBatch(
        pieces,
        num_labels=sum(label != IGNORE_INDEX for row in labels for label in row[1:]),
        num_tokens=sum(map(len, sequences)),
        num_image_vectors=int(vectors[-1]),
    )


def _piece(first: list[int], own: list[list[int]], predicted: list[list[int]], which: np.ndarray) -> MicroBatch:
    """What all begin with, then the sequences, with what each row predicts; `which`: their image vectors' numbers."""
    shared = len(first)
    empty = [0] * (round_up(len(own), SEQUENCE_MULTIPLE) - len(own))
    used = shared + sum(map(len, own))
    rows = round_up(used + 1, ROW_MULTIPLE)  # vectors that make up the number of places share the last row
    fill = np.diff(np.linspace(0, rows - used, FILLS + 1, dtype=int))
    lengths = np.array([shared, *map(len, own), *empty, *fill])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    offsets = np.array([0, *[shared] * (len(lengths) - 1)])  # how many precede the own ones

    def row_of(first: list[int], others: list[list[int]], fill: int) -> np.ndarray:
        """A number for each row."""
        return np.array([*first, *chain.from_iterable(others), *[fill] * (rows - used)], dtype=np.int64)

    ids, targets = row_of(first, own, 0), row_of([IGNORE_INDEX] * shared, predicted, IGNORE_INDEX)
    places, learnt = np.flatnonzero(ids == IMAGE_ID), np.flatnonzero(targets != IGNORE_INDEX)
    images = (0, round_up(len(places), IMAGE_MULTIPLE) - len(places))
    labels = (0, round_up(max(len(learnt), 1), LABEL_MULTIPLE) - len(learnt))
    parts = (
        np.where(ids == IMAGE_ID, 0, ids),
        np.arange(rows) + np.repeat(offsets - starts[:-1], lengths),
        np.pad(places, images, constant_values=rows - 1),
        np.pad(which, images),
        np.pad(learnt, labels),
        np.pad(targets[learnt], labels, constant_values=IGNORE_INDEX),
        starts,
    )
    longest = round_up(int(max(lengths + offsets)), LONGEST_MULTIPLE)
    sizes = Sizes(rows, len(parts[2]), len(own) + len(empty), shared, len(parts[4]), longest)
    return MicroBatch(torch.from_numpy(np.concatenate(parts).astype(np.int64)), sizes)


def shared_beginning(sequences: list[list[int]], labels: list[list[int]]) -> int:
    """How many tokens all sequences begin with, before any image, from which no label is predicted."""
    first, count = sequences[0], 0
    most = min(map(len, sequences)) - 1
    while (
        count < most
        and first[count] != IMAGE_ID
        and all(ids[count] == first[count] for ids in sequences)
        and all(row[count + 1] == IGNORE_INDEX for row in labels)
    ):
        count += 1
    return count
