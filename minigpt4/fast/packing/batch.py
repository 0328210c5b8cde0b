"""Packed batches: sequences of different lengths end to end in one row, which saves padding and repeated work.

- There is no padding, except for some tokens at the end.
- The beginning that all sequences share, up to their first image (`<s>`, the prompt), stands in the row once, as a
  sequence of its own. Its keys and values precede those of each other sequence.
- The last token of a sequence is left out, since nothing is predicted from it.

A batch is cut into micro-batches, each with whole sequences and the shared beginning. The language model takes one at a
time, so that only one needs memory for its activations. Attention is causal within each sequence (`fast/attention.py`).

B sequences, P tokens that they share, T tokens of a micro-batch, N image vectors, K labels, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from minigpt4.fast.attention import Segments
from minigpt4.fast.packing.binning import TOKEN_MULTIPLE, divide, round_up
from minigpt4.models.prompt import IGNORE_INDEX, IMAGE_ID

# Sizes are rounded up to multiples of these, so that few combinations occur: a CUDA graph is captured for each.
LABEL_MULTIPLE, IMAGE_MULTIPLE, SEQUENCE_MULTIPLE, KV_LEN_MULTIPLE = 128, 256, 8, 64
# The padding counts as so many sequences, so that it is never the longest one.
PADDING_SEQUENCES = 4


class Sizes(NamedTuple):
    """The lengths that all shapes of a micro-batch follow from."""

    tokens: int
    image_vectors: int
    sequences: int
    prefix_len: int
    labels: int
    max_kv_len: int


@dataclass
class MicroBatch:
    """B sequences in one row of T tokens, padding at the end.

    All numbers are in one tensor [..] int64, which reaches the GPU, or the input of a CUDA graph, in one copy.
    """

    numbers: torch.Tensor
    sizes: Sizes

    def _parts(self) -> tuple[torch.Tensor, ...]:
        """Token ids, positions, image positions, image vectors' indices, label positions, labels, starts."""
        tokens, images, sequences, _, labels, _ = self.sizes
        return self.numbers.split([tokens, tokens, images, images, labels, labels, sequences + PADDING_SEQUENCES + 2])

    @property
    def input_ids(self) -> torch.Tensor:
        """[1,T], 0 where an image vector belongs."""
        return self._parts()[0].unsqueeze(0)

    @property
    def targets(self) -> torch.Tensor:
        """[1,K] the tokens to be predicted at `logits_to_keep`, IGNORE_INDEX in the padding."""
        return self._parts()[5].unsqueeze(0)

    def insert(self, embeds: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """The embeddings [1,T,D], with the micro-batch's image vectors, of all the batch's [all,D], in their places."""
        _, _, positions, indices, *_ = self._parts()
        return embeds.index_copy(1, positions, vectors.index_select(0, indices).unsqueeze(0))

    def llm_inputs(self) -> dict:
        """Arguments of the language model beside the embeddings [1,T,D]; see `allow_packing`."""
        _, positions, _, _, label_positions, _, starts = self._parts()
        return {
            # transformers passes a mask of four dimensions on unchanged; the packed attention ignores it.
            "attention_mask": self.numbers.view(1, 1, 1, -1),
            "position_ids": positions.unsqueeze(0),
            "segments": Segments(starts.int(), self.sizes.prefix_len, self.sizes.max_kv_len),
            "logits_to_keep": label_positions,
        }


@dataclass
class PackedBatch:
    """The sequences of a batch, in micro-batches."""

    micro_batches: list[MicroBatch]
    num_labels: int
    num_tokens: int  # of all sequences, with the tokens that are shared or left out
    num_image_vectors: int

    def to(self, device: torch.device, non_blocking: bool = False) -> "PackedBatch":
        return self._moved(lambda numbers: numbers.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "PackedBatch":
        return self._moved(torch.Tensor.pin_memory)

    def _moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "PackedBatch":
        return replace(self, micro_batches=[replace(part, numbers=move(part.numbers)) for part in self.micro_batches])

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        for part in self.micro_batches:
            part.numbers.record_stream(stream)


def pack(sequences: list[list[int]], labels: list[list[int]], max_tokens: int) -> PackedBatch:
    """Pack token ids (IMAGE_ID where an image vector belongs) and their labels, of the same lengths, not shifted.

    max_tokens: of a micro-batch; one with a single longer sequence has more.
    """
    prefix_len = shared_prefix(sequences, labels)
    # The last token is left out, unless it is an image vector: the batch has a place for each of those.
    ends = [len(ids) - (ids[-1:] != [IMAGE_ID]) if ids else 0 for ids in sequences]
    first_vector = np.cumsum([0, *(ids.count(IMAGE_ID) for ids in sequences)])
    micro_batches = []
    for group in divide([end - prefix_len for end in ends], prefix_len, max_tokens):
        ids = [sequences[i][prefix_len : ends[i]] for i in group]
        targets = [[*labels[i][1:], IGNORE_INDEX][prefix_len : ends[i]] for i in group]
        vectors = np.concatenate([np.arange(first_vector[i], first_vector[i + 1]) for i in group])
        micro_batches.append(_micro_batch(sequences[0][:prefix_len], ids, targets, vectors))
    return PackedBatch(
        micro_batches,
        num_labels=sum(label != IGNORE_INDEX for row in labels for label in row[1:]),
        num_tokens=sum(map(len, sequences)),
        num_image_vectors=int(first_vector[-1]),
    )


def _micro_batch(
    prefix: list[int], sequences: list[list[int]], targets: list[list[int]], vectors: np.ndarray
) -> MicroBatch:
    """The shared prefix and the sequences behind it, each token's target, and the indices of their image vectors."""
    empty = [0] * (round_up(len(sequences), SEQUENCE_MULTIPLE) - len(sequences))
    used = len(prefix) + sum(map(len, sequences))
    tokens = round_up(used + 1, TOKEN_MULTIPLE)  # surplus image vectors are written to the last token
    padding = np.diff(np.linspace(0, tokens - used, PADDING_SEQUENCES + 1, dtype=int))
    lengths = np.array([len(prefix), *map(len, sequences), *empty, *padding])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    preceding = np.array([0, *[len(prefix)] * (len(lengths) - 1)])  # shared tokens before each sequence

    def row(prefix: list[int], parts: list[list[int]], fill: int) -> np.ndarray:
        return np.array([*prefix, *chain.from_iterable(parts), *[fill] * (tokens - used)], dtype=np.int64)

    ids = row(prefix, sequences, 0)
    target_row = row([IGNORE_INDEX] * len(prefix), targets, IGNORE_INDEX)
    image_positions, label_positions = np.flatnonzero(ids == IMAGE_ID), np.flatnonzero(target_row != IGNORE_INDEX)
    more_images = (0, round_up(len(image_positions), IMAGE_MULTIPLE) - len(image_positions))
    more_labels = (0, round_up(max(len(label_positions), 1), LABEL_MULTIPLE) - len(label_positions))
    parts = (
        np.where(ids == IMAGE_ID, 0, ids),
        np.arange(tokens) + np.repeat(preceding - starts[:-1], lengths),
        np.pad(image_positions, more_images, constant_values=tokens - 1),
        np.pad(vectors, more_images),
        np.pad(label_positions, more_labels),
        np.pad(target_row[label_positions], more_labels, constant_values=IGNORE_INDEX),
        starts,
    )
    max_kv_len = round_up(int(max(lengths + preceding)), KV_LEN_MULTIPLE)
    sizes = Sizes(tokens, len(parts[2]), len(sequences) + len(empty), len(prefix), len(parts[4]), max_kv_len)
    return MicroBatch(torch.from_numpy(np.concatenate(parts).astype(np.int64)), sizes)


def shared_prefix(sequences: list[list[int]], labels: list[list[int]]) -> int:
    """How many tokens all sequences begin with, before any image, from which no label is predicted."""
    most = max(min(map(len, sequences)) - 1, 0)
    for count, token in enumerate(sequences[0][:most]):
        if token == IMAGE_ID or any(ids[count] != token for ids in sequences):
            return count
        if any(row[count + 1] != IGNORE_INDEX for row in labels):
            return count
    return most
