"""Rows rounded to fp8 (e4m3), with one scale a row, by its largest entry.

torch.compile rounds the output of a norm, or its gradient, in the kernel that it generates for the norm:
`quantize_rows`. The outputs of other kernels are rounded by a kernel of ours, which reads a row once
(`kernels/fp8.py`), or by plain operations where there is no GPU: the functions below.

M rows, K columns; F columns of gate, and of up.
"""

import torch
import torch.nn.functional as F

from minigpt4.kernels.dispatch import use_triton

E4M3 = torch.float8_e4m3fn
Quantized = tuple[torch.Tensor, torch.Tensor]


def quantize_rows(x: torch.Tensor) -> Quantized:
    """Rows [M,K] as e4m3 [M,K], and the scale [M,1] float32 of each. A row with inf or NaN becomes NaN."""
    x = x.float()
    largest = torch.finfo(E4M3).max  # as a global number it would be a variable to torch.compile
    scale = (x.abs().amax(dim=1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).to(E4M3, memory_format=torch.contiguous_format), scale


def quantize_rows_by_kernel(x: torch.Tensor) -> Quantized:
    """`quantize_rows` of [M,K], by a kernel on a GPU."""
    if use_triton(x):
        from minigpt4.kernels import fp8 as fp8_kernels

        return fp8_kernels.quantize_rows(x)
    return quantize_rows(x)


def quantize_gelu(x: torch.Tensor) -> Quantized:
    """`quantize_rows` of GELU of [M,K], by a kernel on a GPU."""
    if use_triton(x):
        from minigpt4.kernels import fp8 as fp8_kernels

        return fp8_kernels.quantize_rows(x, gelu=True)
    return quantize_rows(F.gelu(x.float()))


def quantize_silu_product(gate_up: torch.Tensor) -> Quantized:
    """`quantize_rows` of silu(gate) * up, the halves of [M,2F]: [M,F]. By a kernel on a GPU."""
    if use_triton(gate_up):
        from minigpt4.kernels import fp8 as fp8_kernels

        return fp8_kernels.silu_product_quantize(gate_up)
    gate, up = gate_up.float().chunk(2, dim=1)
    return quantize_rows(F.silu(gate) * up)


def quantize_silu_product_gradient(grad: torch.Tensor, gate_up: torch.Tensor) -> Quantized:
    """`quantize_rows` of the gradients [M,2F] of gate and up, from the gradient of silu(gate) * up [M,F].

    By a kernel on a GPU.
    """
    if use_triton(gate_up):
        from minigpt4.kernels import fp8 as fp8_kernels

        return fp8_kernels.silu_product_gradient_quantize(grad, gate_up)
    gate, up = gate_up.float().chunk(2, dim=1)
    of_gate = torch.ops.aten.silu_backward(grad.float() * up, gate)
    return quantize_rows(torch.cat([of_gate, grad.float() * F.silu(gate)], dim=1))
