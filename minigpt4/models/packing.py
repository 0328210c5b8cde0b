"""Packed batches: sequences of different lengths end to end in one row, so that no work is spent on padding.

Attention keeps the sequences apart: it is told where each begins (`cu_seqlens`) and is causal within it. On a GPU that
is torch's variable-length attention; elsewhere a loop over the sequences, exact and good enough for tests.

B sequences, T tokens in all, Q query tokens per image, K labels.
"""

import inspect
import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from minigpt4.models.prompt import IGNORE_INDEX, IMAGE_ID

ATTENTION = "minigpt4_packed"
# How torch's variable-length attention is told to be causal; the name changed between releases.
CAUSAL = {"is_causal": True} if "is_causal" in inspect.signature(varlen_attn).parameters else {"window_size": (-1, 0)}
# Sizes are rounded up to multiples of these, so that few different ones occur: each has a CUDA graph of its own.
TOKEN_MULTIPLE, LABEL_MULTIPLE = 128, 64


class Sizes(NamedTuple):
    """Lengths of the parts of a packed batch: all that its shapes depend on."""

    tokens: int
    image_positions: int
    sequences: int
    labels: int
    longest: int


@dataclass
class PackedBatch:
    """B sequences in one row of T tokens, filled up by one more sequence that nothing is learnt from.

    All numbers lie in one tensor [..] int64, so that they travel to the GPU, and into a CUDA graph, in one copy.
    """

    numbers: torch.Tensor
    sizes: Sizes
    num_labels: int = 0
    num_tokens: int = 0

    def _part(self, index: int) -> torch.Tensor:
        s = self.sizes
        lengths = (s.tokens, s.tokens, s.image_positions, s.sequences + 1, s.labels, s.labels, 1)
        start = sum(lengths[:index])
        return self.numbers[start : start + lengths[index]]

    @property
    def input_ids(self) -> torch.Tensor:
        """[1,T], 0 where an image vector belongs."""
        return self._part(0).unsqueeze(0)

    @property
    def image_positions(self) -> torch.Tensor:
        """[images * Q] where the image vectors belong, in order."""
        return self._part(2)

    @property
    def targets(self) -> torch.Tensor:
        """[1,K] the tokens to be predicted at `logits_to_keep`, IGNORE_INDEX in the fill."""
        return self._part(5).unsqueeze(0)

    @property
    def label_count(self) -> torch.Tensor:
        """[] how many of the targets are labels."""
        return self._part(6).squeeze(0)

    def llm_inputs(self) -> dict:
        """What the language model is called with beside the embeddings [1,T,D]; see `allow_packing`."""
        return {
            # transformers takes a mask of four dimensions as it is; the packed attention does not look at it.
            "attention_mask": self.numbers.view(1, 1, 1, -1),
            "position_ids": self._part(1).unsqueeze(0),
            "cu_seqlens": self._part(3).int(),
            "longest": self.sizes.longest,
            "logits_to_keep": self._part(4),
        }

    def to(self, device: torch.device, non_blocking: bool = False) -> "PackedBatch":
        return replace(self, numbers=self.numbers.to(device, non_blocking=non_blocking))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        self.numbers.record_stream(stream)

    def pin_memory(self) -> "PackedBatch":
        return replace(self, numbers=self.numbers.pin_memory())


def pack(sequences: list[list[int]], labels: list[list[int]]) -> PackedBatch:
    """Pack token ids (IMAGE_ID where an image vector belongs) and their labels, of the same lengths, not shifted."""
    lengths = [len(sequence) for sequence in sequences]
    tokens = round_up(sum(lengths), TOKEN_MULTIPLE)
    lengths.append(tokens - sum(lengths))
    ids = np.concatenate([*map(np.asarray, sequences), np.zeros(lengths[-1], dtype=np.int64)])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    targets = np.concatenate([*map(np.asarray, labels), np.full(lengths[-1] + 1, IGNORE_INDEX)])
    targets[starts[:-1]] = IGNORE_INDEX  # nothing precedes the first token of a sequence
    targets = targets[1:]
    learnt = np.flatnonzero(targets != IGNORE_INDEX)
    fill = round_up(max(len(learnt), 1), LABEL_MULTIPLE) - len(learnt)
    is_image = ids == IMAGE_ID
    parts = (
        np.where(is_image, 0, ids),
        np.arange(tokens) - np.repeat(starts[:-1], lengths),
        np.flatnonzero(is_image),
        starts,
        np.pad(learnt, (0, fill)),
        np.pad(targets[learnt], (0, fill), constant_values=IGNORE_INDEX),
        [len(learnt)],
    )
    longest = round_up(max(lengths), TOKEN_MULTIPLE)
    sizes = Sizes(tokens, int(is_image.sum()), len(lengths), len(learnt) + fill, longest)
    return PackedBatch(torch.from_numpy(np.concatenate(parts).astype(np.int64)), sizes, len(learnt), sum(lengths[:-1]))


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def allow_packing(llm) -> bool:
    """Let a transformers model take packed batches beside the usual ones; returns whether it can.

    Calls with `cu_seqlens`, those of a packed batch, attend within its sequences; others go on as before. It cannot
    where tokens do not see all before them (windows, recurrent layers), or the GPU has no variable-length attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    usual = llm.config._attn_implementation
    if usual.startswith(ATTENTION):
        return True
    known = getattr(llm, "_supports_attention_backend", False) and usual in ALL_MASK_ATTENTION_FUNCTIONS
    device = llm.get_input_embeddings().weight.device
    old_gpu = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    if not known or old_gpu or not sees_all(llm.config.get_text_config()):
        return False
    name = f"{ATTENTION}_{usual}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _attention_function(ALL_ATTENTION_FUNCTIONS[usual]))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[usual])
    llm.set_attn_implementation(name)
    return True


def sees_all(config) -> bool:
    """Whether in every layer of a transformers model tokens attend to all before them, and nothing else mixes them."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def _attention_function(usual):
    """An attention function of transformers: packed where the call says so, otherwise `usual`."""

    def attend(module, query, key, value, attention_mask, scaling=None, cu_seqlens=None, longest=None, **kwargs):
        if cu_seqlens is None:
            return usual(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return packed_attention(query, key, value, scaling, cu_seqlens, longest), None

    return attend


def packed_attention(query, key, value, scaling, cu_seqlens, longest) -> torch.Tensor:
    """Causal attention within each sequence: query [1,H,T,d], key and value [1,H or fewer,T,d], to [1,T,H,d].

    cu_seqlens [B+1] int32: where the sequences begin and end; none is longer than `longest`.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [T,H,d]
    if query.is_cuda and query.dtype != torch.float32:
        d = q.shape[-1]
        # A copy of v where it is a part of a joint projection, all of which would be kept for the backward pass.
        q, k, v = (F.pad(x, (0, -d % 8)).contiguous() for x in (q, k, v))
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scaling, **CAUSAL)[..., :d]
    else:
        out = _one_by_one(q, k, v, cu_seqlens, scaling)
    return out.unsqueeze(0)


def _one_by_one(q, k, v, cu_seqlens, scaling):
    starts = cu_seqlens.tolist()
    outs = [
        F.scaled_dot_product_attention(
            *(x[start:end].transpose(0, 1) for x in (q, k, v)), is_causal=True, scale=scaling
        ).transpose(0, 1)
        for start, end in itertools.pairwise(starts)
    ]
    return torch.cat(outs)
