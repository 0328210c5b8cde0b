"""Rows rounded to fp8 by the kernel that computes them, in Triton.

The scale of a row is that of its largest entry, which the compiler's kernels look for in a pass of its own. Here a
program holds a whole row. The numbers are those of `fp8_rounding.quantize_rows` to rounding, from values that were not
rounded before. Imported only where there is a GPU for it.

M rows, K columns; F columns of gate, and of up.
"""

import torch
import triton
import triton.language as tl

from minigpt4.kernels.llama import silu, silu_gradients, turned_halves
from minigpt4.quantization.fp8_rounding import DTYPE, Rounded

LARGEST, TINY = tl.constexpr(torch.finfo(DTYPE).max), tl.constexpr(torch.finfo(torch.float32).tiny)
COLUMNS_A_WARP, MOST_WARPS = 2048, 32  # the quickest on an H100


@torch.library.custom_op("minigpt4::fp8_rows", mutates_args=())
def rows(x: torch.Tensor) -> Rounded:
    """Rows [M,K] as e4m3 [M,K], and the scale [M,1] float32 of each."""
    return _run(_rows, [x], x.shape[1], x.shape[1], False)


@torch.library.custom_op("minigpt4::fp8_gelu", mutates_args=())
def gelu(x: torch.Tensor) -> Rounded:
    """GELU of [M,K] as e4m3 [M,K], and the scale [M,1] float32 of each row.

    It is GELU's tanh form, off by 5e-4 at most: less than half a step of 8 bits, save for numbers below 0.008.
    """
    return _run(_rows, [x], x.shape[1], x.shape[1], True)


@torch.library.custom_op("minigpt4::fp8_silu_product", mutates_args=())
def silu_product(gate_up: torch.Tensor) -> Rounded:
    """silu(gate) * up of the halves of [M,2F] as e4m3 [M,F], and the scale [M,1] float32 of each row."""
    width = gate_up.shape[1] // 2
    return _run(_silu_product, [gate_up], width, width)


@torch.library.custom_op("minigpt4::fp8_silu_product_gradient", mutates_args=())
def silu_product_gradient(grad: torch.Tensor, gate_up: torch.Tensor) -> Rounded:
    """From the gradient [M,F] of silu(gate) * up those of gate and up: e4m3 [M,2F], and each row's scale [M,1]."""
    return _run(_silu_product_gradient, [gate_up, grad], gate_up.shape[1], gate_up.shape[1] // 2)


def turned_back(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turned: int) -> Rounded:
    """Heads [M,H,d], the first `turned` turned back by angles [M,d/2]: e4m3 [M,H*d], and each row's scale [M,1]."""
    _, heads, d = x.shape
    rounded, scale = empty(x, heads * d)
    all_heads, half = triton.next_power_of_2(heads), triton.next_power_of_2(d // 2)
    with torch.cuda.device_of(scale):
        _turned_back[(scale.shape[0],)](
            x.contiguous(), cos.contiguous(), sin.contiguous(), rounded, scale, heads, turned, d // 2, half, all_heads,
            num_warps=_warps(2 * all_heads * half),
        )  # fmt: skip
    return rounded, scale


def _run(kernel, inputs: list[torch.Tensor], width: int, columns: int, *flags: bool) -> Rounded:
    """A program for each row, which takes so many columns of each of its parts."""
    rounded, scale = empty(inputs[0], width)
    block = triton.next_power_of_2(columns)
    with torch.cuda.device_of(scale):
        tensors = *(x.contiguous() for x in inputs), rounded, scale
        kernel[(scale.shape[0],)](*tensors, *flags, columns, block, num_warps=_warps(block))
    return rounded, scale


def _warps(columns: int) -> int:
    return max(1, min(columns // COLUMNS_A_WARP, MOST_WARPS))


def empty(x: torch.Tensor, width: int) -> Rounded:
    """Memory for rows [M,width] in e4m3 and their scales, where `x` has M rows."""
    # x.shape[0], not len(x): a compiler would have the number of rows fixed.
    return x.new_empty(x.shape[0], width, dtype=DTYPE), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@rows.register_fake
@gelu.register_fake
def _(x):
    return empty(x, x.shape[1])


@silu_product.register_fake
def _(gate_up):
    return empty(gate_up, gate_up.shape[1] // 2)


@silu_product_gradient.register_fake
def _(grad, gate_up):
    return empty(gate_up, gate_up.shape[1])


@triton.jit
def largest_of(values):
    """Its magnitude; infinite where an entry is not a number."""
    return tl.max(tl.where(values == values, tl.abs(values), float("inf")), 0)


@triton.jit
def scale_for(largest, scale, row):
    """Keep and return the scale with which the largest entry of a row becomes the largest number there is."""
    value = tl.maximum(largest / LARGEST, TINY)
    tl.store(scale + row, value)
    return value


@triton.jit
def _rows(x, rounded, scale, GELU: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    values = tl.load(x + row * K + columns, mask=columns < K, other=0.0).to(tl.float32)
    if GELU:
        values *= tl.sigmoid(1.5957691216057308 * (values + 0.044715 * values * values * values))
    values *= 1 / scale_for(largest_of(values), scale, row)
    tl.store(rounded + row * K + columns, values.to(rounded.dtype.element_ty), mask=columns < K)


@triton.jit
def _silu_product(gate_up, rounded, scale, F: tl.constexpr, N: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    at = gate_up + row * 2 * F + columns
    gate = tl.load(at, mask=columns < F, other=0.0).to(tl.float32)
    values = silu(gate, tl.load(at + F, mask=columns < F, other=0.0).to(tl.float32))
    values *= 1 / scale_for(largest_of(values), scale, row)
    tl.store(rounded + row * F + columns, values.to(rounded.dtype.element_ty), mask=columns < F)


@triton.jit
def _silu_product_gradient(gate_up, grad, rounded, scale, F: tl.constexpr, N: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    at, to = gate_up + row * 2 * F + columns, rounded + row * 2 * F + columns
    gate = tl.load(at, mask=columns < F, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=columns < F, other=0.0).to(tl.float32)
    outer = tl.load(grad + row * F + columns, mask=columns < F, other=0.0).to(tl.float32)
    of_gate, of_up = silu_gradients(outer, gate, up)
    factor = 1 / scale_for(tl.maximum(largest_of(of_gate), largest_of(of_up)), scale, row)
    tl.store(to, (of_gate * factor).to(rounded.dtype.element_ty), mask=columns < F)
    tl.store(to + F, (of_up * factor).to(rounded.dtype.element_ty), mask=columns < F)


@triton.jit
def _turned_back(x, cos, sin, rounded, scale, heads, turned, half: tl.constexpr, HALF: tl.constexpr, N: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    first, second, at, present = turned_halves(
        x, cos, sin, row, heads, head, head < heads, head < turned, half, HALF, True
    )
    factor = 1 / scale_for(tl.maximum(largest_of(largest_of(first)), largest_of(largest_of(second))), scale, row)
    tl.store(rounded + at, (first * factor).to(rounded.dtype.element_ty), mask=present)
    tl.store(rounded + at + half, (second * factor).to(rounded.dtype.element_ty), mask=present)
