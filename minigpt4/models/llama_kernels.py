"""Steps of a Llama layer that mostly read and write, as Triton kernels: rotations, and SiLU with its product.

Each reads what a joint product left in one tensor, and its backward pass leaves one gradient in one tensor, in a single
pass, as the product's backward pass wants it; the compiler would put such a gradient together from parts. Rotations
come with the attention behind them, whose gradient is turned back where it lies. Imported only where there is a GPU for
it.
"""

import torch
import triton
import triton.language as tl

from minigpt4.models import packed_kernels

HEADS, COLUMNS = 32, 1024  # of a row, that a program takes


def rotated_attention(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, groups: int,
    starts: torch.Tensor, shared: int, longest: int, scaling: float,
) -> torch.Tensor:  # fmt: skip
    """`packed_kernels.attention` of heads [T,H+2G,d], after those of queries and keys are rotated: [T,H,d].

    cos, sin [T,d/2]: of the angles by which dimensions i and i + d/2 are turned. They get no gradient.
    """
    return _rotated_attention(qkv, cos, sin, groups, starts, shared, longest, scaling)[0]


@torch.library.custom_op("minigpt4::rotated_attention", mutates_args=())
def _rotated_attention(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, groups: int,
    starts: torch.Tensor, shared: int, longest: int, scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The output, and for the backward pass the denominators, as the attention has them, and the heads as rotated."""
    rotated = qkv.new_empty(qkv.shape)
    _launch_rotation(qkv.contiguous(), rotated, cos, sin, groups, back=False)
    return *packed_kernels.attention_and_denominators(rotated, groups, starts, shared, longest, scaling), rotated


@torch.library.custom_op("minigpt4::rotated_attention_backward", mutates_args=())
def _rotated_attention_backward(
    grad: torch.Tensor, rotated: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, groups: int,
    out: torch.Tensor, lse: torch.Tensor, starts: torch.Tensor, shared: int, longest: int, scaling: float,
) -> torch.Tensor:  # fmt: skip
    """The gradient of qkv, before it was rotated."""
    others = rotated, groups, out, lse, starts, shared, longest, scaling
    gradient = packed_kernels.attention_backward(grad, *others)
    _launch_rotation(gradient, gradient, cos, sin, groups, back=True)
    return gradient


def _launch_rotation(x: torch.Tensor, to: torch.Tensor, cos, sin, groups: int, back: bool) -> None:
    """Turn the heads of x [T,H+2G,d], forward or back; `to`, where they go, may be x. Values stay as they are."""
    rows, heads, d = x.shape
    turned = heads - groups
    moved = turned if x is to else heads
    with torch.cuda.device_of(x):
        _rotate[rows, triton.cdiv(moved, HEADS)](
            x, to, cos.contiguous(), sin.contiguous(), moved, heads, turned, d // 2,
            triton.next_power_of_2(d // 2), HEADS, back,
        )  # fmt: skip


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


@_rotated_attention.register_fake
def _(qkv, cos, sin, groups, starts, shared, longest, scaling):
    return *packed_kernels.empty_outputs(qkv, groups), qkv.new_empty(qkv.shape)


@_rotated_attention_backward.register_fake
def _(grad, rotated, *others):
    return rotated.new_empty(rotated.shape)


@silu_product.register_fake
def _(gate_up):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@_silu_product_backward.register_fake
def _(grad, gate_up):
    return torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)


def _keep(ctx, inputs, output) -> None:
    _, cos, sin, ctx.groups, starts, *ctx.others = inputs
    out, lse, rotated = output
    ctx.save_for_backward(rotated, cos, sin, out, lse, starts)
    ctx.set_materialize_grads(False)  # none for the denominators, nor for the rotated heads


def _gradients(ctx, grad, *_):
    rotated, cos, sin, *others = ctx.saved_tensors
    gradient = _rotated_attention_backward(grad, rotated, cos, sin, ctx.groups, *others, *ctx.others)
    return gradient, *[None] * 7


def _keep_input(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


_rotated_attention.register_autograd(_gradients, setup_context=_keep)
silu_product.register_autograd(
    lambda ctx, grad: _silu_product_backward(grad, *ctx.saved_tensors), setup_context=_keep_input
)


@triton.jit
def _rotate(
    x, y, cos, sin, moved, heads, turned,
    half: tl.constexpr, HALF: tl.constexpr, N: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """N heads of a row, of the first `moved`."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N)
    dims = tl.arange(0, HALF)
    at = (row * heads + head)[:, None] * 2 * half + dims
    present = (head < moved)[:, None] & (dims < half)[None, :]
    first, second = tl.load(x + at, mask=present), tl.load(x + at + half, mask=present)
    c = tl.load(cos + row * half + dims, mask=dims < half).to(tl.float32)[None, :]
    s = tl.load(sin + row * half + dims, mask=dims < half).to(tl.float32)[None, :]
    if BACK:
        s = -s
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
