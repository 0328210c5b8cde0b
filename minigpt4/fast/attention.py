"""Attention of packed batches: registered with transformers, and computed within each sequence.

A kernel of ours does it on a GPU in 16 bit (`kernels/packed_attention.py`); elsewhere a loop over the sequences, good
enough for tests.

B sequences, P tokens that they share, T tokens of a micro-batch, H heads of queries, G of keys and values, d dimensions.
"""

import importlib.util
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from minigpt4.kernels.dispatch import use_triton

ATTENTION = "minigpt4_packed"
LARGEST_HEAD = 256  # dimensions that the kernels take


class Segments(NamedTuple):
    """Where the sequences of a piece lie in its rows: what attention needs."""

    starts: torch.Tensor  # [B+FILLS+2] int32: the shared beginning, the sequences, the fill, the end
    shared: int  # P
    longest: int  # no sequence has more keys: its own rows, and before them the shared ones


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
    if use_triton(qkv):
        from minigpt4.kernels import packed_attention as packed_kernels

        return packed_kernels.packed_attention(qkv, groups, *segments, scaling)
    q, k, v = qkv.split([qkv.shape[1] - 2 * groups, groups, groups], dim=1)
    return _one_by_one(q, k, v, segments, scaling)


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
