"""Steps of a Llama layer that mostly read and write, as Triton kernels: rotations, and SiLU with its product.

They read what a joint product left in one tensor. SiLU's backward pass leaves one gradient in one tensor, in a single
pass, as the product's backward pass wants it; the compiler would put it together from parts. Imported only where there
is a GPU for it.
"""

import torch
import triton
import triton.language as tl

HEADS, COLUMNS = 32, 1024  # of a row, that a program takes


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turned: int, back: bool) -> None:
    """Turn the first `turned` heads of x [T,H,d], forward or back, by angles [T,d/2], where they lie.

    Dimensions i and i + d/2 of a head belong together.
    """
    rows, heads, d = x.shape
    with torch.cuda.device_of(x):
        _turn_heads[rows, triton.cdiv(turned, HEADS)](
            x, cos.contiguous(), sin.contiguous(), heads, turned, d // 2, triton.next_power_of_2(d // 2), HEADS, back
        )


@torch.library.custom_op("minigpt4::silu_product", mutates_args=())
def silu_product(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of the halves of [T,2F]: [T,F]."""
    gate_up, width = gate_up.contiguous(), gate_up.shape[1] // 2
    product = gate_up.new_empty(len(gate_up), width)
    with torch.cuda.device_of(gate_up):
        _silu_product[len(gate_up), triton.cdiv(width, COLUMNS)](gate_up, product, width, COLUMNS)
    return product


@torch.library.custom_op("minigpt4::silu_product_backward", mutates_args=())
def _silu_product_backward(grad: torch.Tensor, gate_up: torch.Tensor) -> torch.Tensor:
    gate_up, width = gate_up.contiguous(), gate_up.shape[1] // 2
    gradient = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    with torch.cuda.device_of(gate_up):
        grid = (len(gate_up), triton.cdiv(width, COLUMNS))
        _silu_product_gradient[grid](grad.contiguous(), gate_up, gradient, width, COLUMNS)
    return gradient


@silu_product.register_fake
def _(gate_up):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@_silu_product_backward.register_fake
def _(grad, gate_up):
    return torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)


def _keep_input(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


silu_product.register_autograd(
    lambda ctx, grad: _silu_product_backward(grad, *ctx.saved_tensors), setup_context=_keep_input
)


@triton.jit
def turned_halves(
    x, cos, sin, row, heads, head, wanted, turns, half: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr
):  # fmt: skip
    """Halves [N,HALF] in float32 of heads [N] of a row, turned where `turns`; where they lie, and which there are.

    heads: how many a row has. Those not `wanted` are not read.
    """
    dims = tl.arange(0, HALF)
    at, present = (row * heads + head)[:, None] * 2 * half + dims, wanted[:, None] & (dims < half)[None, :]
    a = tl.load(x + at, mask=present, other=0.0).to(tl.float32)
    b = tl.load(x + at + half, mask=present, other=0.0).to(tl.float32)
    c = tl.load(cos + row * half + dims, mask=dims < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + row * half + dims, mask=dims < half, other=0.0).to(tl.float32)[None, :]
    if BACK:
        s = -s
    turns = turns[:, None]
    return tl.where(turns, a * c - b * s, a), tl.where(turns, b * c + a * s, b), at, present


@triton.jit
def _turn_heads(
    x, cos, sin, heads, turned, half: tl.constexpr, HALF: tl.constexpr, N: tl.constexpr, BACK: tl.constexpr
):
    """N heads of a row, of the first `turned`."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N)
    turns = head < turned
    first, second, at, present = turned_halves(x, cos, sin, row, heads, head, turns, turns, half, HALF, BACK)
    tl.store(x + at, first.to(x.dtype.element_ty), mask=present)
    tl.store(x + at + half, second.to(x.dtype.element_ty), mask=present)


@triton.jit
def _halves(gate_up, row, F: tl.constexpr, N: tl.constexpr):
    """Columns [N] of a program, which there are, and both halves there in float32."""
    columns = tl.program_id(1) * N + tl.arange(0, N)
    present, at = columns < F, gate_up + row * 2 * F + columns
    gate, up = tl.load(at, mask=present).to(tl.float32), tl.load(at + F, mask=present).to(tl.float32)
    return columns, present, gate, up


@triton.jit
def silu(gate, up):
    return gate * tl.sigmoid(gate) * up


@triton.jit
def silu_gradients(outer, gate, up):
    """Of gate and of up, from that of their product."""
    chance = tl.sigmoid(gate)
    activated = gate * chance
    return outer * up * (chance + activated * (1 - chance)), outer * activated


@triton.jit
def _silu_product(gate_up, product, F: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns, present, gate, up = _halves(gate_up, row, F, N)
    tl.store(product + row * F + columns, silu(gate, up).to(product.dtype.element_ty), mask=present)


@triton.jit
def _silu_product_gradient(grad, gate_up, gradient, F: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns, present, gate, up = _halves(gate_up, row, F, N)
    outer = tl.load(grad + row * F + columns, mask=present).to(tl.float32)
    of_gate, of_up = silu_gradients(outer, gate, up)
    to = gradient + row * 2 * F + columns
    tl.store(to, of_gate.to(gradient.dtype.element_ty), mask=present)
    tl.store(to + F, of_up.to(gradient.dtype.element_ty), mask=present)
