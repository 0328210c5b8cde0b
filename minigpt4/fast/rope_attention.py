"""Queries, keys and values of a frozen Llama's layer, rotated, and the attention of a packed batch behind them.

Rotations stand between the joint product and the attention, in both directions, and turn what these leave where it
lies; in fp8 the gradient is rounded as it is turned back. Imported only where there is a GPU for it.

T rows, D width, H heads of queries, G of keys and as many of values, d dimensions.
"""

import torch
import torch.nn.functional as F

from minigpt4.fast.fused_linear import FirstOfFused
from minigpt4.kernels import fp8 as fp8_kernels
from minigpt4.kernels import llama as llama_kernels
from minigpt4.kernels import packed_attention
from minigpt4.quantization import bitsandbytes as low_bit
from minigpt4.quantization import fp8, fp8_rounding


def rotated_attention(
    x: torch.Tensor, joint: FirstOfFused, d: int, groups: int, cos: torch.Tensor, sin: torch.Tensor,
    starts: torch.Tensor, shared: int, longest: int, scaling: float,
) -> torch.Tensor:  # fmt: skip
    """`packed_attention.packed_attention` of heads that are computed from a norm's output [T,D] and rotated: [T,H,d].

    joint: the frozen layer that computes all H+2G heads, in the 16-bit type of x, in low bits (`low_bit.py`) or in fp8;
    d and groups (G): theirs.
    cos, sin [T,d/2]: of the angles by which dimensions i and i + d/2 are turned.
    starts, shared, longest, scaling: as there.

    x alone gets a gradient, in which those of the shared rows' keys and values have no part: in a frozen model, whose
    shared rows come before any image, nobody wants them.
    """
    if isinstance(joint, fp8.Fp8):
        scales = joint.scales_and_columns()
    else:
        scales = getattr(joint, "joint_scale", None), None, None
    return _RotatedAttention.apply(
        x, joint.joint_weight, *scales, cos, sin, starts, d, groups, shared, longest, scaling
    )


class _RotatedAttention(torch.autograd.Function):
    """In fp8 (where there are `columns`) its backward pass multiplies by these."""

    @staticmethod
    def forward(ctx, x, weight, scale, columns, column_scale, cos, sin, starts, d, groups, shared, longest, scaling):
        weights = [weight] if scale is None else [weight, scale]
        factors = [x, *weights] if columns is None else [*fp8_rounding.quantize_rows(x), *weights]
        qkv = _rotated_product(factors, cos, sin, d, groups)
        out, lse = packed_attention.packed_attention_with_lse(qkv, groups, starts, shared, longest, scaling)
        back = weights if columns is None else [columns, column_scale]
        ctx.save_for_backward(qkv, out, lse, starts, cos, sin, *back)
        ctx.numbers, ctx.in_fp8 = (groups, shared, longest, scaling), columns is not None
        return out

    @staticmethod
    def backward(ctx, grad):
        qkv, out, lse, starts, cos, sin, *weights = ctx.saved_tensors
        groups, *others = ctx.numbers
        gradient = _gradient(grad, qkv, groups, out, lse, starts, *others, cos, sin, ctx.in_fp8)
        if ctx.in_fp8:
            product = fp8.product(gradient, *weights)
        elif len(weights) > 1:
            product = low_bit.multiply(gradient[0].flatten(1), *weights, True)
        else:
            product = gradient[0].flatten(1) @ weights[0]
        return product, *[None] * 12


@torch.library.custom_op("minigpt4::rotated_product", mutates_args=())
def _rotated_product(
    factors: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, d: int, groups: int
) -> torch.Tensor:
    """The heads [T,H+2G,d] of queries, keys and values, the first two kinds rotated.

    factors: rows [T,D] and weight [(H+2G)*d,D] of one type; in low bits, the weight's scale as a third; in fp8 those of
    `fp8.product`, rows and their scales, weight and its scales.
    """
    if len(factors) == 2:
        heads = F.linear(*factors)
    elif len(factors) == 3:
        heads = low_bit.multiply(*factors, False)
    else:
        rows, row_scale, weight, scale = factors
        heads = fp8.product((rows, row_scale), weight, scale)
    heads = heads.view(len(heads), -1, d)
    llama_kernels.apply_rope_(heads, cos, sin, heads.shape[1] - groups, inverse=False)
    return heads


@torch.library.custom_op("minigpt4::rotated_attention_backward", mutates_args=())
def _gradient(
    grad: torch.Tensor, qkv: torch.Tensor, groups: int, out: torch.Tensor, lse: torch.Tensor,
    starts: torch.Tensor, shared: int, longest: int, scaling: float,
    cos: torch.Tensor, sin: torch.Tensor, in_fp8: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """The gradient of the heads as of before they were rotated [T,H+2G,d]; in_fp8: in e4m3, and each row's scale."""
    turned = qkv.shape[1] - groups
    gradient = packed_attention.packed_attention_backward(
        grad, qkv, groups, out, lse, starts, shared, longest, scaling, with_prefix_gradient=False
    )
    if in_fp8:
        return [*fp8_kernels.inverse_rope_quantize(gradient, cos, sin, turned)]
    llama_kernels.apply_rope_(gradient, cos, sin, turned, inverse=True)
    return [gradient]


@_rotated_product.register_fake
def _(factors, cos, sin, d, groups):
    in_fp8 = len(factors) == 4
    rows, weight = factors[0], factors[2 if in_fp8 else 1]
    outputs = low_bit.sizes(rows, weight)[0] if len(factors) == 3 else weight.shape[0]
    return rows.new_empty(rows.shape[0], outputs // d, d, dtype=torch.bfloat16 if in_fp8 else rows.dtype)


@_gradient.register_fake
def _(grad, qkv, *others):
    in_fp8 = others[-1]
    return [*fp8_kernels.empty_quantized(qkv, qkv.shape[1] * qkv.shape[2])] if in_fp8 else [qkv.new_empty(qkv.shape)]
