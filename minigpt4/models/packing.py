"""Packed batches: sequences of different lengths end to end in one row, so that no work is spent twice or in vain.

- No padding, save some rows at the end.
- What all sequences begin with, up to their first image (`<s>`, the prompt), stands in the row once, as a sequence of
  its own. Its keys and values precede those of each other sequence.
- The last token of a sequence is left out. It is predicted, but nothing is predicted from it.

Attention keeps the sequences apart: it is told where each begins (`Segments`) and is causal within it. Kernels of our
own do that on a GPU in 16 bit (`packed_kernels.py`); elsewhere a loop over the sequences, good enough for tests.

B sequences, P tokens that they share, T rows in all, Q query tokens per image, K labels.
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
TOKEN_MULTIPLE, LABEL_MULTIPLE = 128, 128


class Sizes(NamedTuple):
    """Lengths of the parts of a packed batch: all that its shapes depend on."""

    rows: int
    image_positions: int
    sequences: int
    shared: int
    labels: int
    longest: int


class Segments(NamedTuple):
    """Where the sequences of a packed batch lie in its rows: what attention needs."""

    starts: torch.Tensor  # [B+3] int32: the shared beginning, the sequences, the fill, the end
    shared: int  # P
    longest: int  # no sequence has more keys: its own rows, and before them the shared ones


@dataclass
class PackedBatch:
    """B sequences in one row of T tokens, filled up by one more sequence that nothing is learnt from.

    All numbers lie in one tensor [..] int64, so that they travel to the GPU, and into a CUDA graph, in one copy.
    """

    numbers: torch.Tensor
    sizes: Sizes
    num_labels: int = 0
    num_tokens: int = 0  # of the sequences, those included that are shared or left out

    def _parts(self) -> list[torch.Tensor]:
        """In the order of `pack`."""
        rows, image_positions, sequences, _, labels, _ = self.sizes
        return self.numbers.split([rows, rows, image_positions, labels, labels, 1, sequences + 3])

    @property
    def input_ids(self) -> torch.Tensor:
        """[1,T], 0 where an image vector belongs."""
        return self._parts()[0].unsqueeze(0)

    @property
    def image_positions(self) -> torch.Tensor:
        """[images * Q] where the image vectors belong, in order."""
        return self._parts()[2]

    @property
    def targets(self) -> torch.Tensor:
        """[1,K] the tokens to be predicted at `logits_to_keep`, IGNORE_INDEX in the fill."""
        return self._parts()[4].unsqueeze(0)

    @property
    def label_count(self) -> torch.Tensor:
        """[] how many of the targets are labels."""
        return self._parts()[5].squeeze(0)

    def llm_inputs(self) -> dict:
        """What the language model is called with beside the embeddings [1,T,D]; see `allow_packing`."""
        _, positions, _, label_rows, _, _, starts = self._parts()
        return {
            # transformers takes a mask of four dimensions as it is; the packed attention does not look at it.
            "attention_mask": self.numbers.view(1, 1, 1, -1),
            "position_ids": positions.unsqueeze(0),
            "segments": Segments(starts.int(), self.sizes.shared, self.sizes.longest),
            "logits_to_keep": label_rows,
        }

    def to(self, device: torch.device, non_blocking: bool = False) -> "PackedBatch":
        return replace(self, numbers=self.numbers.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        self.numbers.record_stream(stream)

    def pin_memory(self) -> "PackedBatch":
        return replace(self, numbers=self.numbers.pin_memory())


def pack(sequences: list[list[int]], labels: list[list[int]]) -> PackedBatch:
    """Pack token ids (IMAGE_ID where an image vector belongs) and their labels, of the same lengths, not shifted."""
    shared = shared_beginning(sequences, labels)
    # An image vector is never left out: `embed` puts in all of them.
    ends = [len(ids) - (ids[-1:] != [IMAGE_ID]) if ids else 0 for ids in sequences]
    lengths = np.array([shared, *(end - shared for end in ends), 0])
    lengths[-1] = round_up(max(lengths.sum(), 1), TOKEN_MULTIPLE) - lengths.sum()
    rows, starts = lengths.sum(), np.concatenate([[0], np.cumsum(lengths)])

    def row_of(first: list[int], others: list[list[int]], fill: int) -> np.ndarray:
        """A number for each row."""
        parts = [first[:shared], *(other[shared:end] for other, end in zip(others, ends, strict=True))]
        return np.array([*chain.from_iterable(parts), *[fill] * lengths[-1]], dtype=np.int64)

    ids = row_of(sequences[0], sequences, 0)
    predicted = row_of([IGNORE_INDEX] * shared, [[*row[1:], IGNORE_INDEX] for row in labels], IGNORE_INDEX)
    is_image, is_label = ids == IMAGE_ID, predicted != IGNORE_INDEX
    num_labels = int(is_label.sum())
    fill = round_up(max(num_labels, 1), LABEL_MULTIPLE) - num_labels

    offsets = np.array([0, *[shared] * len(sequences), shared])  # how many precede the own ones; the fill's too
    parts = (
        np.where(is_image, 0, ids),
        np.arange(rows) + np.repeat(offsets - starts[:-1], lengths),
        np.flatnonzero(is_image),
        np.pad(np.flatnonzero(is_label), (0, fill)),
        np.pad(predicted[is_label], (0, fill), constant_values=IGNORE_INDEX),
        [num_labels],
        starts,
    )
    longest = round_up(int(max(lengths + offsets)), TOKEN_MULTIPLE)
    sizes = Sizes(int(rows), int(is_image.sum()), len(sequences), shared, num_labels + fill, longest)
    numbers = torch.from_numpy(np.concatenate(parts).astype(np.int64))
    return PackedBatch(numbers, sizes, num_labels, sum(map(len, sequences)))


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
    """Causal attention within each sequence: query [1,H,T,d], key and value [1,H or fewer,T,d], to [1,T,H,d]."""
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T,H,d]
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        from minigpt4.models.packed_kernels import attention

        out = attention(q, k, v, *segments, q.shape[-1] ** -0.5 if scaling is None else scaling)
    else:
        out = _one_by_one(q, k, v, segments, scaling)
    return out.unsqueeze(0)


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
