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

import importlib.util
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from minigpt4.models.prompt import IGNORE_INDEX, IMAGE_ID

ATTENTION = "minigpt4_packed"
LARGEST_HEAD = 256  # dimensions that the kernels take
# Sizes are rounded up to multiples of these, so that few different ones occur: each has a CUDA graph of its own.
ROW_MULTIPLE, LABEL_MULTIPLE, IMAGE_MULTIPLE, SEQUENCE_MULTIPLE, LONGEST_MULTIPLE = 128, 128, 256, 8, 64
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


class Segments(NamedTuple):
    """Where the sequences of a piece lie in its rows: what attention needs."""

    starts: torch.Tensor  # [B+FILLS+2] int32: the shared beginning, the sequences, the fill, the end
    shared: int  # P
    longest: int  # no sequence has more keys: its own rows, and before them the shared ones


@dataclass
class Piece:
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

    def to(self, device: torch.device, non_blocking: bool = False) -> "Piece":
        return replace(self, numbers=self.numbers.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Piece":
        return replace(self, numbers=self.numbers.pin_memory())


@dataclass
class PackedBatch:
    """The sequences of a batch, in pieces."""

    pieces: list[Piece]
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


def pack(sequences: list[list[int]], labels: list[list[int]], piece_rows: int) -> PackedBatch:
    """Pack token ids (IMAGE_ID where an image vector belongs) and their labels, of the same lengths, not shifted.

    piece_rows: the most that a piece has, but for a longer sequence.
    """
    shared = shared_beginning(sequences, labels)
    # An image vector is never left out: the batch has a place for each.
    ends = [len(ids) - (ids[-1:] != [IMAGE_ID]) if ids else 0 for ids in sequences]
    vectors = np.cumsum([0, *(ids.count(IMAGE_ID) for ids in sequences)])
    pieces = []
    for group in divide([end - shared for end in ends], shared, piece_rows):
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


def divide(lengths: list[int], shared: int, piece_rows: int) -> list[list[int]]:
    """Sequences with so many rows of their own, by number, in groups of `piece_rows` at most, or of one that has more.

    A group costs multiples of ROW_MULTIPLE rows: each but the last takes the sequences that leave least of them empty.
    """
    groups, left, most = [], [*range(len(lengths))], max(piece_rows - shared - 1, 1)
    while left:
        own = [lengths[i] for i in left]
        count = min(-(-sum(own) // most), len(left))
        multiples = -(-(sum(own) + count * (shared + 1)) // ROW_MULTIPLE)
        room = min(-(-multiples // max(count, 1)) * ROW_MULTIPLE - shared - 1, most)
        chosen = (
            {*left} if count <= 1 else {left[n] for n in fullest(own, room)} or {max(left, key=lengths.__getitem__)}
        )
        groups.append(sorted(chosen))
        left = [i for i in left if i not in chosen]
    return groups


def fullest(lengths: list[int], room: int) -> list[int]:
    """The lengths, by number, that together come closest to `room` and do not exceed it."""
    sums = [1]  # bit s of sums[n]: some of the first n lengths add up to s
    for length in lengths:
        sums.append((sums[-1] | sums[-1] << length) & (2 << room) - 1)
    total, chosen = sums[-1].bit_length() - 1, []
    for n in reversed(range(len(lengths))):
        if not sums[n] >> total & 1:  # those before do not give it
            chosen.append(n)
            total -= lengths[n]
    return chosen


def _piece(first: list[int], own: list[list[int]], predicted: list[list[int]], which: np.ndarray) -> Piece:
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
    return Piece(torch.from_numpy(np.concatenate(parts).astype(np.int64)), sizes)


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


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def allow_packing(llm) -> bool:
    """Let a transformers model take packed batches beside the usual ones; returns whether it can.

    Calls with `segments`, those of a packed batch, attend within its sequences; others go on as before. It cannot
    where tokens do not see all before them (windows, recurrent layers), or the kernels do not run: on GPUs older than
    Ampere, without Triton, with heads of more than 256 dimensions or other ones of values than of keys.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    usual = llm.config._attn_implementation
    if usual.startswith(ATTENTION):
        return True
    known = getattr(llm, "_supports_attention_backend", False) and usual in ALL_MASK_ATTENTION_FUNCTIONS
    config = llm.config.get_text_config()
    if not known or not sees_all(config) or not _attention_runs(config, llm.get_input_embeddings().weight.device):
        return False
    name = f"{ATTENTION}_{usual}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _attention_function(ALL_ATTENTION_FUNCTIONS[usual]))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[usual])
    llm.set_attn_implementation(name)
    return True


def _attention_runs(config, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    new_enough = torch.cuda.get_device_capability(device) >= (8, 0)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fits = head <= LARGEST_HEAD and not hasattr(config, "v_head_dim")  # values as long as keys
    return new_enough and fits and importlib.util.find_spec("triton") is not None


def sees_all(config) -> bool:
    """Whether in every layer of a transformers model tokens attend to all before them, and nothing else mixes them."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def _attention_function(usual):
    """An attention function of transformers: packed where the call says so, otherwise `usual`."""

    def attend(module, query, key, value, attention_mask, scaling=None, segments=None, **kwargs):
        if segments is None:
            return usual(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return packed_attention(query, key, value, scaling, segments), None

    return attend


def packed_attention(query, key, value, scaling, segments: Segments) -> torch.Tensor:
    """Causal attention within each sequence: query [1,H,T,d], key and value [1,G,T,d], to [1,T,H,d].

    scaling: None: d**-0.5.
    """
    qkv = torch.cat([x.squeeze(0).transpose(0, 1) for x in (query, key, value)], dim=1)
    scaling = qkv.shape[-1] ** -0.5 if scaling is None else scaling
    return joint_attention(qkv, key.shape[1], scaling, segments).unsqueeze(0)


def joint_attention(qkv, groups: int, scaling: float, segments: Segments) -> torch.Tensor:
    """Causal attention within each sequence, of heads of queries, keys and values [T,H+2G,d] to [T,H,d]."""
    if by_kernels(qkv):
        from minigpt4.models.packed_kernels import attention

        return attention(qkv, groups, *segments, scaling)
    q, k, v = qkv.split([qkv.shape[1] - 2 * groups, groups, groups], dim=1)
    return _one_by_one(q, k, v, segments, scaling)


def by_kernels(x: torch.Tensor) -> bool:
    """Whether steps with `x` are Triton kernels of ours."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def _one_by_one(q, k, v, segments: Segments, scaling):
    outs = []
    for number, (start, end) in enumerate(pairwise(segments.starts.tolist())):
        before = segments.shared if number else 0
        own = q[start:end].transpose(0, 1)  # [H,..,d]
        keys, values = (torch.cat([x[:before], x[start:end]]).transpose(0, 1) for x in (k, v))
        causal = torch.ones(end - start, before + end - start, dtype=torch.bool, device=q.device).tril(before)
        out = F.scaled_dot_product_attention(own, keys, values, attn_mask=causal, scale=scaling, enable_gqa=True)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)
