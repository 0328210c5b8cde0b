"""A sum and its layer norm, as in the blocks of a vision encoder, in one pass over rows: a Triton kernel.

A program holds a whole row. torch.compile's kernels take rows of more than 1,024 columns twice. Imported only where
there is a GPU for it.

M rows, K columns.
"""

import torch
import triton
import triton.language as tl

from minigpt4.models.fp8_kernels import empty, largest_of, scale_for

COLUMNS_A_WARP = 1024  # the quickest on an H100


@torch.library.custom_op("minigpt4::sum_norm", mutates_args=())
def sum_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [...,K] + delta, in x's type, and its layer norm with weight and bias [K], in delta's. Without a gradient.

    Sum, mean and variance are in float32.
    """
    total, normed = x.new_empty(x.shape), delta.new_empty(delta.shape)
    _launch(x, delta, weight, bias, eps, total, normed, None)
    return total, normed


@torch.library.custom_op("minigpt4::fp8_sum_norm", mutates_args=())
def rounded_sum_norm(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`sum_norm` with the norm as e4m3 rows [M,K], and a scale [M,1] float32 of each."""
    total, rounded = x.new_empty(x.shape), empty(delta.flatten(0, -2), delta.shape[-1])
    _launch(x, delta, weight, bias, eps, total, *rounded)
    return total, *rounded


def _launch(x, delta, weight, bias, eps: float, total, normed, scale) -> None:
    columns = x.shape[-1]
    block = triton.next_power_of_2(columns)
    with torch.cuda.device_of(x):
        _sum_norm[(x.numel() // columns,)](
            x.contiguous(), delta.contiguous(), weight, bias, total, normed, scale, eps, columns, block,
            num_warps=max(1, min(block // COLUMNS_A_WARP, 32)),
        )  # fmt: skip


@sum_norm.register_fake
def _(x, delta, weight, bias, eps):
    return x.new_empty(x.shape), delta.new_empty(delta.shape)


@rounded_sum_norm.register_fake
def _(x, delta, weight, bias, eps):
    return x.new_empty(x.shape), *empty(delta.flatten(0, -2), delta.shape[-1])


@triton.jit
def _sum_norm(x, delta, weight, bias, total, normed, scale, eps, K: tl.constexpr, N: tl.constexpr):
    """scale: None where the norm is not rounded to fp8."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    at, present = row * K + columns, columns < K
    values = tl.load(x + at, mask=present, other=0.0).to(tl.float32)
    values += tl.load(delta + at, mask=present, other=0.0).to(tl.float32)
    tl.store(total + at, values.to(total.dtype.element_ty), mask=present)
    centred = tl.where(present, values - tl.sum(values, 0) / K, 0.0)
    centred *= tl.rsqrt(tl.sum(centred * centred, 0) / K + eps)
    result = centred * tl.load(weight + columns, mask=present, other=0.0).to(tl.float32)
    result += tl.load(bias + columns, mask=present, other=0.0).to(tl.float32)
    if scale is not None:
        result *= 1 / scale_for(largest_of(result), scale, row)
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask=present)
