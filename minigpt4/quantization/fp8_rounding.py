"""Rows rounded to fp8 (e4m3), with one scale a row, by its largest entry: as plain operations, and by kernels of ours.

What a norm computes, in either direction, torch.compile rounds in the kernel that it makes of the norm anyway:
`quantize_rows`. What other kernels leave is rounded by one of ours, which takes a row once (`fp8_kernels.py`); where
there is no GPU, by the same operations.

M rows, K columns; F columns of gate, and of up.
"""

import torch
import torch.nn.functional as F

from minigpt4.kernels.dispatch import use_triton

DTYPE = torch.float8_e4m3fn
Rounded = tuple[torch.Tensor, torch.Tensor]


def quantize_rows(x: torch.Tensor) -> Rounded:
    """Rows [M,K] as e4m3 [M,K], and the scale [M,1] float32 of each. What is not finite makes its row NaN."""
    x = x.float()
    largest = torch.finfo(DTYPE).max  # as a global number it would be a variable to torch.compile
    scale = (x.abs().amax(dim=1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).to(DTYPE, memory_format=torch.contiguous_format), scale


def round_rows(x: torch.Tensor) -> Rounded:
    """`quantize_rows` of [M,K] by a kernel of its own where there is a GPU, as the next three are."""
    if use_triton(x):
        from minigpt4.kernels import fp8 as fp8_kernels

        return fp8_kernels.quantize_rows(x)
    return quantize_rows(x)


def round_gelu(x: torch.Tensor) -> Rounded:
    """`quantize_rows` of GELU of [M,K]."""
    if use_triton(x):
        from minigpt4.kernels import fp8 as fp8_kernels

        return fp8_kernels.gelu_quantize(x)
    return quantize_rows(F.gelu(x.float()))


def round_silu_product(gate_up: torch.Tensor) -> Rounded:
    """`quantize_rows` of silu(gate) * up, the halves of [M,2F]: [M,F]."""
    if use_triton(gate_up):
        from minigpt4.kernels import fp8 as fp8_kernels

        return fp8_kernels.silu_product_quantize(gate_up)
    gate, up = gate_up.float().chunk(2, dim=1)
    return quantize_rows(F.silu(gate) * up)


def round_silu_product_gradient(grad: torch.Tensor, gate_up: torch.Tensor) -> Rounded:
    """`quantize_rows` of the gradients [M,2F] of gate and up, from that of silu(gate) * up [M,F]."""
    if use_triton(gate_up):
        from minigpt4.kernels import fp8 as fp8_kernels

        return fp8_kernels.silu_product_gradient_quantize(grad, gate_up)
    gate, up = gate_up.float().chunk(2, dim=1)
    of_gate = torch.ops.aten.silu_backward(grad.float() * up, gate)
    return quantize_rows(torch.cat([of_gate, grad.float() * F.silu(gate)], dim=1))
