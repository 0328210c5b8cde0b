"""Triton kernels for the elementwise steps of a Llama layer: rotary position embedding, and silu(gate) * up.

These steps are limited by memory bandwidth. The kernels read a fused linear layer's output as one tensor. The backward
pass of silu(gate) * up writes one gradient tensor in a single pass, which the fused layer's backward pass takes as it
is; torch.compile would concatenate it from parts. Import this module only where there is a GPU with Triton.

Shapes: T tokens, H heads of d dimensions, F features of gate, and as many of up.
"""

import torch
import triton
import triton.language as tl

from minigpt4.kernels.e4m3 import abs_max, store_scale

BLOCK_H, BLOCK_F = 32, 1024  # heads, and features, of a row that one program takes


def apply_rope_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, inverse: bool) -> None:
    """Rotate the first `num_heads` heads of x [T,H,d] in place by angles [T,d/2].

    Dimensions i and i + d/2 of a head are rotated as a pair. inverse: by the negative angles, as gradients need it.
    """
    num_rows, heads_per_row, d = x.shape
    grid = (num_rows, triton.cdiv(num_heads, BLOCK_H))
    block_half = triton.next_power_of_2(d // 2)
    with torch.cuda.device_of(x):
        apply_rope_kernel[grid](
            x, cos.contiguous(), sin.contiguous(), x, None, heads_per_row, num_heads, d // 2, block_half, BLOCK_H,
            inverse,
        )  # fmt: skip


@torch.library.custom_op("minigpt4::silu_product", mutates_args=())
def silu_product(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where gate and up are the halves of [T,2F]: [T,F]."""
    gate_up, num_features = gate_up.contiguous(), gate_up.shape[1] // 2
    product = gate_up.new_empty(len(gate_up), num_features)
    grid = (len(gate_up), triton.cdiv(num_features, BLOCK_F))
    with torch.cuda.device_of(gate_up):
        silu_product_kernel[grid](gate_up, product, None, num_features, BLOCK_F)
    return product


@torch.library.custom_op("minigpt4::silu_product_backward", mutates_args=())
def _silu_product_backward(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    gate_up, num_features = gate_up.contiguous(), gate_up.shape[1] // 2
    gradient = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    grid = (len(gate_up), triton.cdiv(num_features, BLOCK_F))
    with torch.cuda.device_of(gate_up):
        silu_product_gradient_kernel[grid](gate_up, grad.contiguous(), gradient, None, num_features, BLOCK_F)
    return gradient


@silu_product.register_fake
def _(gate_up):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@_silu_product_backward.register_fake
def _(grad, gate_up):
    return torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


silu_product.register_autograd(
    lambda ctx, grad: _silu_product_backward(grad, *ctx.saved_tensors), setup_context=_setup_context
)


@triton.jit
def apply_rope_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, scale_ptr, heads_per_row, num_heads,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_H: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """One program rotates BLOCK_H heads of a row of x [T,H,d], among the first `num_heads`. HALF: d/2.

    scale_ptr: if it is not None, the program holds all heads of the row, and quantizes them.
    """
    row, offs_d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_HALF)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    rotate = (heads < num_heads)[:, None]
    mask = rotate & (offs_d < HALF)[None, :]
    if scale_ptr is not None:
        mask = (heads < heads_per_row)[:, None] & (offs_d < HALF)[None, :]
    offsets = (row * heads_per_row + heads)[:, None] * 2 * HALF + offs_d
    x1 = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + row * HALF + offs_d, mask=offs_d < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + row * HALF + offs_d, mask=offs_d < HALF, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin = -sin
    first = tl.where(rotate, x1 * cos - x2 * sin, x1)
    second = tl.where(rotate, x2 * cos + x1 * sin, x2)
    if scale_ptr is not None:
        factor = 1 / store_scale(tl.maximum(abs_max(abs_max(first)), abs_max(abs_max(second))), scale_ptr, row)
        first, second = first * factor, second * factor
    tl.store(out_ptr + offsets, first.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + offsets + HALF, second.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_gate_up(gate_up_ptr, row, F: tl.constexpr, BLOCK_F: tl.constexpr):
    """The features [BLOCK_F] of a program, the mask of those that exist, and their gate and up in float32."""
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = offs_f < F
    gate_ptr = gate_up_ptr + row * 2 * F + offs_f
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + F, mask=mask, other=0.0).to(tl.float32)
    return offs_f, mask, gate, up


@triton.jit
def silu_product_kernel(gate_up_ptr, product_ptr, scale_ptr, F: tl.constexpr, BLOCK_F: tl.constexpr):
    """One program computes BLOCK_F features of silu(gate) * up in a row.

    scale_ptr: if it is not None, the program holds the whole row, and quantizes it.
    """
    row = tl.program_id(0).to(tl.int64)
    offs_f, mask, gate, up = _load_gate_up(gate_up_ptr, row, F, BLOCK_F)
    product = gate * tl.sigmoid(gate) * up
    if scale_ptr is not None:
        product *= 1 / store_scale(abs_max(product), scale_ptr, row)
    tl.store(product_ptr + row * F + offs_f, product.to(product_ptr.dtype.element_ty), mask=mask)


@triton.jit
def silu_product_gradient_kernel(
    gate_up_ptr, grad_ptr, gradient_ptr, scale_ptr, F: tl.constexpr, BLOCK_F: tl.constexpr
):  # fmt: skip
    """The gradients of gate and up, from the gradient of silu(gate) * up. scale_ptr: as above."""
    row = tl.program_id(0).to(tl.int64)
    offs_f, mask, gate, up = _load_gate_up(gate_up_ptr, row, F, BLOCK_F)
    grad = tl.load(grad_ptr + row * F + offs_f, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate, grad_up = grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu
    if scale_ptr is not None:
        factor = 1 / store_scale(tl.maximum(abs_max(grad_gate), abs_max(grad_up)), scale_ptr, row)
        grad_gate, grad_up = grad_gate * factor, grad_up * factor
    gradient_ptr += row * 2 * F + offs_f
    tl.store(gradient_ptr, grad_gate.to(gradient_ptr.dtype.element_ty), mask=mask)
    tl.store(gradient_ptr + F, grad_up.to(gradient_ptr.dtype.element_ty), mask=mask)
