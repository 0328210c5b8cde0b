"""Triton kernels that compute something and quantize its rows to fp8 (e4m3) in the same pass.

The scale of a row depends on the largest entry of the row. In these kernels one program holds a whole row, so a row is
read once; torch.compile's kernels read it a second time to find the largest entry. The results equal those of
`fp8_rounding.quantize_rows` to rounding, but the values are not rounded to 16 bit before they are quantized. Import
this module only where there is a GPU with Triton.

Shapes: M rows, K columns; F features of gate, and as many of up; H heads of d dimensions.
"""

import torch
import triton
import triton.language as tl

from minigpt4.kernels.e4m3 import Quantized, abs_max, empty_quantized, store_scale
from minigpt4.kernels.llama import apply_rope_kernel, silu_product_gradient_kernel, silu_product_kernel

COLUMNS_PER_WARP, MAX_WARPS = 2048, 32  # the fastest on an H100


@torch.library.custom_op("minigpt4::fp8_quantize_rows", mutates_args=())
def quantize_rows(x: torch.Tensor, gelu: bool = False) -> Quantized:
    """Quantize rows [M,K], or GELU of these: e4m3 [M,K], and each row's scale [M,1] float32.

    It is GELU's tanh form, off by 5e-4 at most: less than half a step of 8 bits, save for numbers below 0.008.
    """
    return _launch(_quantize_rows, [x], x.shape[1], x.shape[1], gelu)


@torch.library.custom_op("minigpt4::fp8_silu_product", mutates_args=())
def silu_product_quantize(gate_up: torch.Tensor) -> Quantized:
    """Quantize silu(gate) * up, the halves of [M,2F]: e4m3 [M,F], and each row's scale [M,1] float32."""
    num_features = gate_up.shape[1] // 2
    return _launch(silu_product_kernel, [gate_up], num_features, num_features)


@torch.library.custom_op("minigpt4::fp8_silu_product_gradient", mutates_args=())
def silu_product_gradient_quantize(grad: torch.Tensor, gate_up: torch.Tensor) -> Quantized:
    """Quantize the gradients of gate and up, given the gradient [M,F] of silu(gate) * up.

    Returns e4m3 [M,2F], and each row's scale [M,1] float32.
    """
    return _launch(silu_product_gradient_kernel, [gate_up, grad], gate_up.shape[1], gate_up.shape[1] // 2)


def inverse_rope_quantize(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int) -> Quantized:
    """Rotate the first `num_heads` heads of x [M,H,d] by the negative angles [M,d/2], and quantize.

    Returns e4m3 [M,H*d], and each row's scale [M,1] float32.
    """
    _, heads_per_row, d = x.shape
    quantized, scale = empty_quantized(x, heads_per_row * d)
    block_h, block_half = triton.next_power_of_2(heads_per_row), triton.next_power_of_2(d // 2)
    with torch.cuda.device_of(scale):
        apply_rope_kernel[(scale.shape[0],)](
            x.contiguous(), cos.contiguous(), sin.contiguous(), quantized, scale, heads_per_row, num_heads,
            d // 2, block_half, block_h, True, num_warps=_num_warps(2 * block_h * block_half),
        )  # fmt: skip
    return quantized, scale


def _launch(kernel, inputs: list[torch.Tensor], out_columns: int, columns: int, *flags: bool) -> Quantized:
    """Run one program for each row. columns: how many the program loads, of each part (gate, up) of the row."""
    quantized, scale = empty_quantized(inputs[0], out_columns)
    block = triton.next_power_of_2(columns)
    tensors = [*(x.contiguous() for x in inputs), quantized, scale]
    with torch.cuda.device_of(scale):
        kernel[(scale.shape[0],)](*tensors, *flags, columns, block, num_warps=_num_warps(block))
    return quantized, scale


def _num_warps(columns: int) -> int:
    return max(1, min(columns // COLUMNS_PER_WARP, MAX_WARPS))


@quantize_rows.register_fake
def _(x, gelu=False):
    return empty_quantized(x, x.shape[1])


@silu_product_quantize.register_fake
def _(gate_up):
    return empty_quantized(gate_up, gate_up.shape[1] // 2)


@silu_product_gradient_quantize.register_fake
def _(grad, gate_up):
    return empty_quantized(gate_up, gate_up.shape[1])


@triton.jit
def _quantize_rows(x_ptr, out_ptr, scale_ptr, GELU: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_K)
    mask = columns < K
    values = tl.load(x_ptr + row * K + columns, mask=mask, other=0.0).to(tl.float32)
    if GELU:
        values *= tl.sigmoid(1.5957691216057308 * (values + 0.044715 * values * values * values))
    values *= 1 / store_scale(abs_max(values), scale_ptr, row)
    tl.store(out_ptr + row * K + columns, values.to(out_ptr.dtype.element_ty), mask=mask)
