"""Two steps of a Llama layer that mostly read and write, as Triton kernels: rotations, and SiLU with its product.

Each reads what a joint product left in one tensor, and its backward pass leaves one gradient in one tensor, in a single
pass, as the product's backward pass wants it; the compiler would put such a gradient together from parts. Imported only
where there is a GPU for it.
"""

import torch
import triton
import triton.language as tl

HEADS, COLUMNS = 32, 1024  # of a row, that a program takes


@torch.library.custom_op("minigpt4::rotate", mutates_args=())
def rotate(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turned: int) -> torch.Tensor:
    """Heads [T,H,d], the first `turned` with dimensions i and i + d/2 rotated by angles [T,d/2]; others as they are."""
    qkv, rotated = qkv.contiguous(), torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    rows, heads, d = qkv.shape
    with torch.cuda.device_of(qkv):
        _rotate[rows, triton.cdiv(heads, HEADS)](
            qkv,
            rotated,
            cos.contiguous(),
            sin.contiguous(),
            heads,
            turned,
            d // 2,
            triton.next_power_of_2(d // 2),
            HEADS,
        )
    return rotated


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


@rotate.register_fake
def _(qkv, cos, sin, turned):
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)


@silu_product.register_fake
def _(gate_up):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@_silu_product_backward.register_fake
def _(grad, gate_up):
    return torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)


def _keep_angles(ctx, inputs, output) -> None:
    _, *angles, ctx.turned = inputs
    ctx.save_for_backward(*angles)


def _turn_back(ctx, grad):
    cos, sin = ctx.saved_tensors
    return rotate(grad, cos, -sin, ctx.turned), None, None, None


def _keep_input(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


rotate.register_autograd(_turn_back, setup_context=_keep_angles)
silu_product.register_autograd(
    lambda ctx, grad: _silu_product_backward(grad, *ctx.saved_tensors), setup_context=_keep_input
)


@triton.jit
def _rotate(x, y, cos, sin, heads, turned, half: tl.constexpr, HALF: tl.constexpr, N: tl.constexpr):
    """N heads of a row."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N)
    dims = tl.arange(0, HALF)
    at = (row * heads + head)[:, None] * 2 * half + dims
    present = (head < heads)[:, None] & (dims < half)[None, :]
    first, second = tl.load(x + at, mask=present), tl.load(x + at + half, mask=present)
    c = tl.load(cos + row * half + dims, mask=dims < half).to(tl.float32)[None, :]
    s = tl.load(sin + row * half + dims, mask=dims < half).to(tl.float32)[None, :]
    a, b, turns = first.to(tl.float32), second.to(tl.float32), (head < turned)[:, None]
    tl.store(y + at, tl.where(turns, (a * c - b * s).to(first.dtype), first), mask=present)
    tl.store(y + at + half, tl.where(turns, (b * c + a * s).to(first.dtype), second), mask=present)


@triton.jit
def _halves(gate_up, row, F: tl.constexpr, N: tl.constexpr):
    """Columns [N] of a program, which there are, and both halves there in float32."""
    columns = tl.program_id(1) * N + tl.arange(0, N)
    present, at = columns < F, gate_up + row * 2 * F + columns
    gate, up = tl.load(at, mask=present).to(tl.float32), tl.load(at + F, mask=present).to(tl.float32)
    return columns, present, gate, up


@triton.jit
def _silu_product(gate_up, product, F: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns, present, gate, up = _halves(gate_up, row, F, N)
    value = gate * tl.sigmoid(gate) * up
    tl.store(product + row * F + columns, value.to(product.dtype.element_ty), mask=present)


@triton.jit
def _silu_product_gradient(grad, gate_up, gradient, F: tl.constexpr, N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns, present, gate, up = _halves(gate_up, row, F, N)
    outer = tl.load(grad + row * F + columns, mask=present).to(tl.float32)
    chance = tl.sigmoid(gate)
    silu = gate * chance
    to = gradient + row * 2 * F + columns
    tl.store(to, (outer * up * (chance + silu * (1 - chance))).to(gradient.dtype.element_ty), mask=present)
    tl.store(to + F, (outer * silu).to(gradient.dtype.element_ty), mask=present)
