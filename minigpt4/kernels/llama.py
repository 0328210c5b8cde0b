"""Triton kernels for the elementwise steps of a Llama layer: rotary position embedding, and silu(gate) * up.

These steps are limited by memory bandwidth. The kernels read a fused linear layer's output as one tensor. The backward
pass of silu(gate) * up writes one gradient tensor in a single pass, which the fused layer's backward pass takes as it
is; torch.compile would concatenate it from parts. Import this module only where there is a GPU with Triton.

Shapes: T tokens, H heads of d dimensions, F features of gate, and as many of up.
"""

import torch
import triton
import triton.language as tl

BLOCK_H, BLOCK_F = 32, 1024  # heads, and features, of a row that one program takes


def apply_rope_(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, inverse: bool) -> None:
    """Rotate the first `num_heads` heads of x [T,H,d] in place by angles [T,d/2].

    Dimensions i and i + d/2 of a head are rotated as a pair. inverse: by the negative angles, as gradients need it.
    """
    num_rows, heads_per_row, d = x.shape
    grid = (num_rows, triton.cdiv(num_heads, BLOCK_H))
    block_half = triton.next_power_of_2(d // 2)
    with torch.cuda.device_of(x):
        _apply_rope[grid](
            x, cos.contiguous(), sin.contiguous(), heads_per_row, num_heads, d // 2, block_half, BLOCK_H, inverse
        )


@torch.library.custom_op("minigpt4::silu_product", mutates_args=())
def silu_product(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where gate and up are the halves of [T,2F]: [T,F]."""
    gate_up, num_features = gate_up.contiguous(), gate_up.shape[1] // 2
    product = gate_up.new_empty(len(gate_up), num_features)
    grid = (len(gate_up), triton.cdiv(num_features, BLOCK_F))
    with torch.cuda.device_of(gate_up):
        _silu_product[grid](gate_up, product, num_features, BLOCK_F)
    return product


@torch.library.custom_op("minigpt4::silu_product_backward", mutates_args=())
def _silu_product_backward(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    gate_up, num_features = gate_up.contiguous(), gate_up.shape[1] // 2
    gradient = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    grid = (len(gate_up), triton.cdiv(num_features, BLOCK_F))
    with torch.cuda.device_of(gate_up):
        _silu_product_gradient[grid](grad.contiguous(), gate_up, gradient, num_features, BLOCK_F)
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
def rotated_halves(
    x_ptr, cos_ptr, sin_ptr, row, heads_per_row, heads, load, rotate,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """Load some heads of a row of x [T,H,d], and rotate some of these.

    heads [N]: their numbers. load [N], rotate [N]: whether a head is loaded, and whether it is rotated. HALF: d/2.

    Returns the first and the second halves of their dimensions [N,BLOCK_HALF] float32, and offsets and mask of the
    first halves in x. The second halves are HALF elements further on.
    """
    offs_d = tl.arange(0, BLOCK_HALF)
    offsets = (row * heads_per_row + heads)[:, None] * 2 * HALF + offs_d
    mask = load[:, None] & (offs_d < HALF)[None, :]
    x1 = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + row * HALF + offs_d, mask=offs_d < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + row * HALF + offs_d, mask=offs_d < HALF, other=0.0).to(tl.float32)[None, :]
    if INVERSE:
        sin = -sin
    rotate = rotate[:, None]
    first = tl.where(rotate, x1 * cos - x2 * sin, x1)
    second = tl.where(rotate, x2 * cos + x1 * sin, x2)
    return first, second, offsets, mask


@triton.jit
def _apply_rope(
    x_ptr, cos_ptr, sin_ptr, heads_per_row, num_heads,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_H: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """One program rotates BLOCK_H heads of a row, among the first `num_heads`."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    rotate = heads < num_heads
    first, second, offsets, mask = rotated_halves(
        x_ptr, cos_ptr, sin_ptr, row, heads_per_row, heads, rotate, rotate, HALF, BLOCK_HALF, INVERSE
    )
    tl.store(x_ptr + offsets, first.to(x_ptr.dtype.element_ty), mask=mask)
    tl.store(x_ptr + offsets + HALF, second.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_gate_up(gate_up_ptr, row, F: tl.constexpr, BLOCK_F: tl.constexpr):
    """The features [BLOCK_F] of a program, the mask of those that exist, and their gate and up in float32."""
    offs_f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = offs_f < F
    gate_ptr = gate_up_ptr + row * 2 * F + offs_f
    gate, up = tl.load(gate_ptr, mask=mask).to(tl.float32), tl.load(gate_ptr + F, mask=mask).to(tl.float32)
    return offs_f, mask, gate, up


@triton.jit
def silu_mul(gate, up):
    return gate * tl.sigmoid(gate) * up


@triton.jit
def silu_mul_gradients(grad, gate, up):
    """The gradients of gate and up, from the gradient of silu(gate) * up."""
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    return grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu


@triton.jit
def _silu_product(gate_up_ptr, product_ptr, F: tl.constexpr, BLOCK_F: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs_f, mask, gate, up = _load_gate_up(gate_up_ptr, row, F, BLOCK_F)
    product = silu_mul(gate, up).to(product_ptr.dtype.element_ty)
    tl.store(product_ptr + row * F + offs_f, product, mask=mask)


@triton.jit
def _silu_product_gradient(grad_ptr, gate_up_ptr, gradient_ptr, F: tl.constexpr, BLOCK_F: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs_f, mask, gate, up = _load_gate_up(gate_up_ptr, row, F, BLOCK_F)
    grad = tl.load(grad_ptr + row * F + offs_f, mask=mask).to(tl.float32)
    grad_gate, grad_up = silu_mul_gradients(grad, gate, up)
    gradient_ptr += row * 2 * F + offs_f
    tl.store(gradient_ptr, grad_gate.to(gradient_ptr.dtype.element_ty), mask=mask)
    tl.store(gradient_ptr + F, grad_up.to(gradient_ptr.dtype.element_ty), mask=mask)
