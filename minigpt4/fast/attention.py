"""Attention of packed batches: registered with transformers, and computed within each sequence.

A Triton kernel computes it on a GPU in 16 bit (`kernels/packed_attention.py`). Elsewhere a loop over the sequences
does, which is fast enough for tests.

P tokens that all sequences share, T tokens of a micro-batch, H heads of queries, G of keys and of values, d dimensions.
"""

import importlib.util
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F

from minigpt4.common import compat
from minigpt4.kernels.dispatch import use_triton

ATTENTION = "minigpt4_packed"
LARGEST_HEAD = 256  # dimensions that the kernels take


class Segments(NamedTuple):
    """Where each sequence of a micro-batch begins, for the attention."""

    starts: torch.Tensor  # int32: of the shared tokens, of each sequence, of the padding, and T
    prefix_len: int  # P
    max_kv_len: int  # bound of the keys that a token sees: those of its own sequence, and P shared ones


def allow_packing(llm) -> bool:
    """Let a transformers model take packed batches beside padded ones; returns whether it can.

    A call with `segments` attends within the sequences of a packed batch; other calls stay as they were. A model cannot
    take them where tokens do not see all earlier ones (windows, recurrent layers), nor where attention weights are
    dropped in training. It cannot either where the kernels do not run: on GPUs older than Ampere, without Triton, with
    heads of more than 256 dimensions, or with values that are not as long as keys.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    usual = compat.attention_implementation(llm.config)
    if usual.startswith(ATTENTION):
        return True
    if usual not in ALL_MASK_ATTENTION_FUNCTIONS or not compat.calls_registered_attention(llm):
        return False
    config = llm.config.get_text_config()
    device = llm.get_input_embeddings().weight.device
    if not compat.attends_to_all_before(config) or not _kernel_runs(config, device):
        return False
    if getattr(config, "attention_dropout", 0) and any(p.requires_grad for p in llm.parameters()):
        return False
    name = f"{ATTENTION}_{usual}"
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, _attention_function(ALL_ATTENTION_FUNCTIONS[usual]))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[usual])
    llm.set_attn_implementation(name)
    return True


def disallow_packing(llm) -> None:
    """Give a model back the attention that it had before `allow_packing`."""
    name = compat.attention_implementation(llm.config)
    if name.startswith(ATTENTION):
        llm.set_attn_implementation(name.removeprefix(f"{ATTENTION}_"))


def _kernel_runs(config, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    new_enough = torch.cuda.get_device_capability(device) >= (8, 0)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fits = head_dim <= LARGEST_HEAD and not hasattr(config, "v_head_dim")  # values as long as keys
    return new_enough and fits and importlib.util.find_spec("triton") is not None


def _attention_function(usual):
    """An attention function for transformers: within the sequences where the call has `segments`, otherwise `usual`."""

    def attend(module, query, key, value, attention_mask, scaling=None, segments=None, **kwargs):
        if segments is None:
            return usual(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return packed_attention(query, key, value, scaling, segments), None

    return attend


def packed_attention(query, key, value, scaling: float | None, segments: Segments) -> torch.Tensor:
    """Causal attention within each sequence: query [1,H,T,d], key and value [1,G,T,d], to [1,T,H,d].

    scaling: None: d**-0.5.
    """
    qkv = torch.cat([x.squeeze(0).transpose(0, 1) for x in (query, key, value)], dim=1)
    scaling = qkv.shape[-1] ** -0.5 if scaling is None else scaling
    return joint_attention(qkv, key.shape[1], scaling, segments).unsqueeze(0)


def joint_attention(qkv: torch.Tensor, num_kv_heads: int, scaling: float, segments: Segments) -> torch.Tensor:
    """Causal attention within each sequence, of heads of queries, keys and values [T,H+2G,d] to [T,H,d]."""
    if use_triton(qkv):
        from minigpt4.kernels import packed_attention as kernel

        return kernel.packed_attention_with_lse(qkv, num_kv_heads, *segments, scaling)[0]
    q, k, v = qkv.split([qkv.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    return _sequence_by_sequence(q, k, v, segments, scaling)


def _sequence_by_sequence(q, k, v, segments: Segments, scaling: float) -> torch.Tensor:
    outs = []
    for number, (start, end) in enumerate(pairwise(segments.starts.tolist())):
        prefix_len = segments.prefix_len if number else 0
        queries = q[start:end].transpose(0, 1)  # [H,..,d]
        keys, values = (torch.cat([x[:prefix_len], x[start:end]]).transpose(0, 1) for x in (k, v))
        visible = torch.ones(end - start, prefix_len + end - start, dtype=torch.bool, device=q.device).tril(prefix_len)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=visible, scale=scaling, enable_gqa=True)
        outs.append(out.transpose(0, 1))
    return torch.cat(outs)
