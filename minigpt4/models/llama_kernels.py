"""Steps of a Llama layer that mostly read and write, as Triton kernels: rotations, and SiLU with its product.

Each reads what a joint product left in one tensor, and its backward pass leaves one gradient in one tensor, in a single
pass, as the product's backward pass wants it; the compiler would put such a gradient together from parts. Rotations
stand between that product and the attention behind it, in both directions, and turn what these leave where it lies.
Imported only where there is a GPU for it.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from minigpt4.models import fp8, fp8_rounding, packed_kernels
from minigpt4.models.fused import FirstOfFused

HEADS, COLUMNS = 32, 1024  # of a row, that a program takes


def rotated_attention(
    x: torch.Tensor, joint: FirstOfFused, d: int, groups: int, cos: torch.Tensor, sin: torch.Tensor,
    starts: torch.Tensor, shared: int, longest: int, scaling: float,
) -> torch.Tensor:  # fmt: skip
    """Queries, keys and values of a norm's output [T,D], rotated, and `packed_kernels.attention` of them: [T,H,d].

    joint: the frozen layer that computes all H+2G heads, in 16 bit or in fp8.
    cos, sin [T,d/2]: of the angles by which dimensions i and i + d/2 are turned. They get no gradient, nor do keys and
    values of shared rows: all that these hang on is frozen (`fused_llama`).
    """
    scales = joint.scales_and_columns() if isinstance(joint, fp8.Fp8) else (None, None, None)
    return _RotatedAttention.apply(
        x, joint.joint_weight, *scales, cos, sin, starts, d, groups, shared, longest, scaling
    )


class _RotatedAttention(torch.autograd.Function):
    """With a gradient for x alone. In fp8 (`scale` is not None) its backward pass multiplies by `columns`."""

    @staticmethod
    def forward(ctx, x, weight, scale, columns, column_scale, cos, sin, starts, d, groups, shared, longest, scaling):
        factors = [x, weight] if scale is None else [*fp8_rounding.quantize_rows(x), weight, scale]
        qkv = _rotated_product(factors, cos, sin, d, groups)
        out, lse = packed_kernels.attention_and_denominators(qkv, groups, starts, shared, longest, scaling)
        ctx.save_for_backward(
            qkv, out, lse, starts, cos, sin, *([weight] if scale is None else [columns, column_scale])
        )
        ctx.numbers = groups, shared, longest, scaling
        return out

    @staticmethod
    def backward(ctx, grad):
        qkv, out, lse, starts, cos, sin, *weight = ctx.saved_tensors
        groups, *others = ctx.numbers
        in_fp8 = len(weight) > 1
        gradient = _gradient(grad, qkv, groups, out, lse, starts, *others, cos, sin, in_fp8)
        product = fp8.product(gradient, *weight) if in_fp8 else gradient[0].flatten(1) @ weight[0]
        return product, *[None] * 12


@torch.library.custom_op("minigpt4::rotated_product", mutates_args=())
def _rotated_product(
    factors: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, d: int, groups: int
) -> torch.Tensor:
    """The heads [T,H+2G,d] of queries, keys and values, the first two kinds rotated.

    factors: rows [T,D] and weight [(H+2G)*d,D]; in fp8 rows, their scales, weight and its scales (`fp8.product`).
    """
    if len(factors) == 2:
        heads = F.linear(*factors)
    else:
        rows, row_scale, weight, scale = factors
        heads = fp8.product((rows, row_scale), weight, scale)
    heads = heads.view(len(heads), -1, d)
    _turn(heads, cos, sin, heads.shape[1] - groups, back=False)
    return heads


@torch.library.custom_op("minigpt4::rotated_attention_backward", mutates_args=())
def _gradient(
    grad: torch.Tensor, qkv: torch.Tensor, groups: int, out: torch.Tensor, lse: torch.Tensor,
    starts: torch.Tensor, shared: int, longest: int, scaling: float,
    cos: torch.Tensor, sin: torch.Tensor, in_fp8: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """The gradient of the heads as of before they were rotated [T,H+2G,d]; in_fp8: in e4m3, and each row's scale."""
    gradient = packed_kernels.attention_backward(
        grad, qkv, groups, out, lse, starts, shared, longest, scaling, of_shared=False
    )
    if in_fp8:
        from minigpt4.models import fp8_kernels

        return [*fp8_kernels.turned_back(gradient, cos, sin, qkv.shape[1] - groups)]
    _turn(gradient, cos, sin, qkv.shape[1] - groups, back=True)
    return [gradient]


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turned: int, back: bool) -> None:
    """Turn the first heads of x [T,H,d], forward or back, where they lie."""
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


@_rotated_product.register_fake
def _(factors, cos, sin, d, groups):
    in_fp8 = len(factors) > 2
    rows, weight = factors[0], factors[2 if in_fp8 else 1]
    return rows.new_empty(rows.shape[0], weight.shape[0] // d, d, dtype=torch.bfloat16 if in_fp8 else rows.dtype)


@_gradient.register_fake
def _(grad, qkv, *others):
    if others[-1]:
        from minigpt4.models import fp8_kernels

        return [*fp8_kernels.empty(qkv, qkv.shape[1] * qkv.shape[2])]
    return [qkv.new_empty(qkv.shape)]


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
def turned_halves(x, cos, sin, row, head, heads, turned, half: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr):
    """Heads [N] of a row, the first `turned` turned: halves [N,HALF] in float32, where they lie, which there are."""
    dims = tl.arange(0, HALF)
    at, present = (row * heads + head)[:, None] * 2 * half + dims, (head < heads)[:, None] & (dims < half)[None, :]
    a = tl.load(x + at, mask=present, other=0.0).to(tl.float32)
    b = tl.load(x + at + half, mask=present, other=0.0).to(tl.float32)
    c = tl.load(cos + row * half + dims, mask=dims < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + row * half + dims, mask=dims < half, other=0.0).to(tl.float32)[None, :]
    if BACK:
        s = -s
    turns = (head < turned)[:, None]
    return tl.where(turns, a * c - b * s, a), tl.where(turns, b * c + a * s, b), at, present


@triton.jit
def _turn_heads(
    x, cos, sin, heads, turned, half: tl.constexpr, HALF: tl.constexpr, N: tl.constexpr, BACK: tl.constexpr
):
    """N heads of a row, of the first `turned`."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * N + tl.arange(0, N)
    first, second, at, present = turned_halves(x, cos, sin, row, head, heads, turned, half, HALF, BACK)
    present = present & (head < turned)[:, None]
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
