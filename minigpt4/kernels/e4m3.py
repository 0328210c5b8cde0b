"""Shared by the Triton kernels that quantize the rows that they compute to fp8 (e4m3)."""

import torch
import triton
import triton.language as tl

DTYPE = torch.float8_e4m3fn
Quantized = tuple[torch.Tensor, torch.Tensor]  # e4m3 rows, and the scale [M,1] float32 of each: values * scale
DTYPE_MAX, SMALLEST_SCALE = tl.constexpr(torch.finfo(DTYPE).max), tl.constexpr(torch.finfo(torch.float32).tiny)


def empty_quantized(x: torch.Tensor, num_columns: int) -> Quantized:
    """Uninitialized e4m3 rows [M,num_columns] and scales [M,1] float32, where `x` has M rows."""
    # x.shape[0] instead of len(x), which would make the number of rows a constant of a compiled graph.
    quantized = x.new_empty(x.shape[0], num_columns, dtype=DTYPE)
    return quantized, x.new_empty(x.shape[0], 1, dtype=torch.float32)


@triton.jit
def abs_max(values):
    """The largest absolute value, over the first dimension; infinity if one of the values is NaN."""
    return tl.max(tl.where(values == values, tl.abs(values), float("inf")), 0)


@triton.jit
def store_scale(row_max, scale_ptr, row):
    """Store and return the scale of a row. Its largest entry, divided by the scale, is the largest e4m3 number."""
    scale = tl.maximum(row_max / DTYPE_MAX, SMALLEST_SCALE)
    tl.store(scale_ptr + row, scale)
    return scale
