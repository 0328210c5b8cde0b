"""Queries, keys and values of a frozen Llama's layer, rotated (RoPE), and the attention of a micro-batch.

Rotations are computed in place between the joint product and the attention, in both directions. In fp8 the gradient is
rounded in the same kernel. Imported only where there is a GPU for it.

T tokens, D width, H heads of queries, G of keys and as many of values, d dimensions.
"""

import torch
import torch.nn.functional as F
from torch import nn

from minigpt4.kernels import fp8 as fp8_kernels
from minigpt4.kernels import llama as llama_kernels
from minigpt4.kernels.packed_attention import packed_attention_backward, packed_attention_with_lse
from minigpt4.quantization.bitsandbytes import LowBitLinear, low_bit_matmul, weight_shape
from minigpt4.quantization.fp8 import Fp8Linear, fp8_matmul
from minigpt4.quantization.fp8_rounding import quantize_rows


def rope_attention(
    x: torch.Tensor, qkv_layer: nn.Module, d: int, num_kv_heads: int, cos: torch.Tensor, sin: torch.Tensor,
    starts: torch.Tensor, prefix_len: int, max_kv_len: int, scaling: float,
    added: torch.Tensor | None = None, with_prefix_gradient: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The output [T,H,d] of the heads' attention, for a norm's output x [T,D].

    Args:
        qkv_layer: the frozen layer that computes all H+2G heads: in the 16-bit type of x, a `LowBitLinear` or an
            `Fp8Linear`.
        cos, sin: [T,d/2], of the angles by which dimensions i and i + d/2 are rotated.
        starts, prefix_len, max_kv_len, scaling: as for `packed_attention_with_lse`.
        added: [T,(H+2G)*d], what adapters add to the layer's output.
        with_prefix_gradient: whether the shared tokens' keys and values have a gradient, too. It is of no use where
            nothing in the model trains: these tokens precede any image.

    Only x and `added` get gradients.
    """
    scales = [None, None, None]  # of the weight; in fp8 also its copy for the backward pass, and that one's
    if isinstance(qkv_layer, Fp8Linear):
        scales = [qkv_layer.scale, qkv_layer.columns, qkv_layer.column_scale]
    elif isinstance(qkv_layer, LowBitLinear):
        scales[0] = qkv_layer.scale
    return _RopeAttention.apply(
        x, qkv_layer.weight, *scales, added, cos, sin, starts, d, num_kv_heads, prefix_len, max_kv_len, scaling,
        with_prefix_gradient,
    )  # fmt: skip


class _RopeAttention(torch.autograd.Function):
    """In fp8, where there are `columns`, the backward pass multiplies by these."""

    @staticmethod
    def forward(
        ctx, x, weight, scale, columns, column_scale, added, cos, sin, starts,
        d, num_kv_heads, prefix_len, max_kv_len, scaling, with_prefix_gradient,
    ):  # fmt: skip
        weights = [weight] if scale is None else [weight, scale]
        factors = [x, *weights] if columns is None else [*quantize_rows(x), *weights]
        qkv = rope_product(factors, cos, sin, d, num_kv_heads, added)
        out, lse = packed_attention_with_lse(qkv, num_kv_heads, starts, prefix_len, max_kv_len, scaling)
        backward_weights = weights if columns is None else [columns, column_scale]
        ctx.save_for_backward(qkv, out, lse, starts, cos, sin, *backward_weights)
        ctx.sizes, ctx.in_fp8 = (prefix_len, max_kv_len, scaling), columns is not None
        ctx.num_kv_heads, ctx.has_added = num_kv_heads, added is not None
        ctx.with_prefix_gradient = with_prefix_gradient
        return out

    @staticmethod
    def backward(ctx, grad):
        qkv, out, lse, starts, cos, sin, *weights = ctx.saved_tensors
        rounds = ctx.in_fp8 and not ctx.has_added  # the gradient of adapters is not rounded to fp8
        gradient = rope_attention_backward(
            grad, qkv, ctx.num_kv_heads, out, lse, starts, *ctx.sizes, cos, sin, rounds, ctx.with_prefix_gradient
        )
        of_added = gradient[0].flatten(1) if ctx.has_added else None
        if ctx.in_fp8:
            of_input = fp8_matmul(gradient if rounds else quantize_rows(of_added), *weights)
        elif len(weights) > 1:
            of_input = low_bit_matmul(gradient[0].flatten(1), *weights, True)
        else:
            of_input = gradient[0].flatten(1) @ weights[0]
        return of_input, None, None, None, None, of_added, *[None] * 9


@torch.library.custom_op("minigpt4::rotated_product", mutates_args=())
def rope_product(
    factors: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, d: int, num_kv_heads: int,
    added: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The heads [T,H+2G,d] of queries, keys and values, the first two kinds rotated. added: to their product.

    factors: x [T,D] and weight [(H+2G)*d,D] of one type; in low bits, the weight's scale as a third; in fp8 the factors
    of `fp8_matmul`: rows and their scales, weight and its scales.
    """
    if len(factors) == 2:
        heads = F.linear(*factors)
    elif len(factors) == 3:
        heads = low_bit_matmul(*factors, False)
    else:
        rows, row_scale, weight, scale = factors
        heads = fp8_matmul((rows, row_scale), weight, scale)
    if added is not None:
        heads += added
    heads = heads.view(len(heads), -1, d)
    llama_kernels.apply_rope_(heads, cos, sin, heads.shape[1] - num_kv_heads, inverse=False)
    return heads


@torch.library.custom_op("minigpt4::rotated_attention_backward", mutates_args=())
def rope_attention_backward(
    grad: torch.Tensor, qkv: torch.Tensor, num_kv_heads: int, out: torch.Tensor, lse: torch.Tensor,
    starts: torch.Tensor, prefix_len: int, max_kv_len: int, scaling: float,
    cos: torch.Tensor, sin: torch.Tensor, in_fp8: bool, with_prefix_gradient: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """The gradient of the heads before their rotation [T,H+2G,d]; in_fp8: in e4m3, and the scale of each row."""
    rotated_heads = qkv.shape[1] - num_kv_heads
    gradient = packed_attention_backward(
        grad, qkv, num_kv_heads, out, lse, starts, prefix_len, max_kv_len, scaling, with_prefix_gradient
    )
    if in_fp8:
        return [*fp8_kernels.inverse_rope_quantize(gradient, cos, sin, rotated_heads)]
    llama_kernels.apply_rope_(gradient, cos, sin, rotated_heads, inverse=True)
    return [gradient]


@rope_product.register_fake
def _(factors, cos, sin, d, num_kv_heads, added=None):
    in_fp8 = len(factors) == 4
    rows, weight = factors[0], factors[2 if in_fp8 else 1]
    outputs = weight_shape(rows, weight)[0] if len(factors) == 3 else weight.shape[0]
    return rows.new_empty(rows.shape[0], outputs // d, d, dtype=torch.bfloat16 if in_fp8 else rows.dtype)


@rope_attention_backward.register_fake
def _(grad, qkv, *others):
    in_fp8 = others[-2]
    if in_fp8:
        return [*fp8_kernels.empty_quantized(qkv, qkv.shape[1] * qkv.shape[2])]
    return [qkv.new_empty(qkv.shape)]
