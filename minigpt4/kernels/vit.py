"""Two steps of a vision encoder's blocks as Triton kernels: a sum and its layer norm, and attention.

A program of the norm holds a whole row; torch.compile's kernels take rows of more than 1,024 columns twice. The
attention is made for odd sizes, as 257 tokens and heads of 88 dimensions: kernels made for any size round both up to
powers of two, or to a block. Here a head's dimensions are taken in two parts (64 and 32 for 88), and the last keys by a
block of their own (16 for one). Imported only where there is a GPU for it.

M rows, K columns; B images, N image tokens, H heads of d dimensions.
"""

import torch
import triton
import triton.language as tl

from minigpt4.kernels.fp8 import empty, largest_of, scale_for

# The quickest on an H100. STAGES: not 1, with which Triton 3.6 makes a kernel that reads where it must not.
COLUMNS_A_WARP, QUERIES, KEYS, WARPS, STAGES = 1024, 64, 32, 4, 3
LOG2_E = tl.constexpr(1.4426950408889634)  # powers of two are quicker than those of e


@torch.library.custom_op("minigpt4::sum_norm", mutates_args=())
def sum_norm(
    terms: list[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor, eps: float, in_fp8: bool
) -> list[torch.Tensor]:
    """The layer norm of the sum of two terms [...,K], in the last one's type; in_fp8: as e4m3 rows [M,K] and a scale
    [M,1] float32 of each. Of three terms the sum comes before it, in the first one's type. Without a gradient.

    Sum, mean and variance are in float32.
    """
    x, delta, *rest = (term.contiguous() for term in terms)
    outputs = _outputs(terms, in_fp8)
    total, normed, scale = [None] * (not rest) + outputs + [None] * (not in_fp8)
    columns = x.shape[-1]
    block = triton.next_power_of_2(columns)
    with torch.cuda.device_of(x):
        _sum_norm[(x.numel() // columns,)](
            x, delta, *(rest or [None]), weight, bias, total, normed, scale, eps, columns, block,
            num_warps=max(1, min(block // COLUMNS_A_WARP, 32)),
        )  # fmt: skip
    return outputs


def _outputs(terms: list[torch.Tensor], in_fp8: bool) -> list[torch.Tensor]:
    first, last = terms[0], terms[-1]
    normed = empty(last.flatten(0, -2), last.shape[-1]) if in_fp8 else [last.new_empty(last.shape)]
    return [first.new_empty(first.shape)] * (len(terms) > 2) + [*normed]


@sum_norm.register_fake
def _(terms, weight, bias, eps, in_fp8):
    return _outputs(terms, in_fp8)


@torch.library.custom_op("minigpt4::vit_attention", mutates_args=())
def attention(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention of all tokens of an image to each other: qkv [B,N,3*H*d], queries first, to [B,N,H*d]. 16 bit.

    Scores and sums are in float32, scaled by d**-0.5. Without a gradient.
    """
    images, tokens, width = qkv.shape
    d, out = width // (3 * heads), qkv.new_empty(images, tokens, width // 3)
    first = max(16, 1 << d.bit_length() - 1)  # 16: the least that a product takes
    second = max(16, triton.next_power_of_2(d - first)) if d > first else 0
    left = tokens % KEYS
    rest = max(16, triton.next_power_of_2(left)) if left else 0
    with torch.cuda.device_of(qkv):
        _attend[triton.cdiv(tokens, QUERIES), images * heads](
            qkv.contiguous(), out, d**-0.5, tokens, heads, d, first, second, QUERIES, KEYS, rest,
            num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return out


@attention.register_fake
def _(qkv, heads):
    return qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)


@triton.jit
def _sum_norm(
    x, delta, second, weight, bias, total, normed, scale, eps, K: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """second: None where there are two terms; total: None where it is not kept; scale: None without fp8."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, N)
    at, present = row * K + columns, columns < K
    values = tl.load(x + at, mask=present, other=0.0).to(tl.float32)
    values += tl.load(delta + at, mask=present, other=0.0).to(tl.float32)
    if second is not None:
        values += tl.load(second + at, mask=present, other=0.0).to(tl.float32)
    if total is not None:
        tl.store(total + at, values.to(total.dtype.element_ty), mask=present)
    centred = tl.where(present, values - tl.sum(values, 0) / K, 0.0)
    centred *= tl.rsqrt(tl.sum(centred * centred, 0) / K + eps)
    result = centred * tl.load(weight + columns, mask=present, other=0.0).to(tl.float32)
    result += tl.load(bias + columns, mask=present, other=0.0).to(tl.float32)
    if scale is not None:
        result *= 1 / scale_for(largest_of(result), scale, row)
    tl.store(normed + at, result.to(normed.dtype.element_ty), mask=present)


@triton.jit
def _load(x, rows, stride, count, d: tl.constexpr, START: tl.constexpr, D: tl.constexpr):
    """Dimensions START to START + D of rows [R,D], 0 where there are none."""
    dims = START + tl.arange(0, D)
    return tl.load(x + rows[:, None] * stride + dims, mask=(rows < count)[:, None] & (dims < d)[None, :], other=0.0)


@triton.jit
def _see(
    q1, q2, k, v, keys, stride, scale, highest, total, o1, o2,
    N: tl.constexpr, d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """What queries [M,D1] and [M,D2] make of a block of keys: highest score, sum and output, with what was before."""
    scores = tl.dot(q1, tl.trans(_load(k, keys, stride, N, d, 0, D1)))
    if D2:
        scores = tl.dot(q2, tl.trans(_load(k, keys, stride, N, d, D1, D2)), scores)
    if LAST:
        scores = tl.where((keys < N)[None, :], scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - higher[:, None])
    shrunk = tl.exp2(highest - higher)
    total = total * shrunk + tl.sum(weights, 1)
    weights = weights.to(q1.dtype)
    o1 = tl.dot(weights, _load(v, keys, stride, N, d, 0, D1), o1 * shrunk[:, None])
    if D2:
        o2 = tl.dot(weights, _load(v, keys, stride, N, d, D1, D2), o2 * shrunk[:, None])
    return higher, total, o1, o2


@triton.jit
def _attend(
    qkv, out, scaling, N: tl.constexpr, H: tl.constexpr, d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """One head's outputs of a block of M queries, from blocks of K keys and one of REST."""
    image, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    stride, scale = 3 * H * d, scaling * LOG2_E
    q = qkv + image * N * stride + head * d
    k, v = q + H * d, q + 2 * H * d
    rows = tl.program_id(0) * M + tl.arange(0, M)
    q1 = _load(q, rows, stride, N, d, 0, D1)
    q2 = _load(q, rows, stride, N, d, D1, D2) if D2 else q1
    highest, total = tl.full([M], float("-inf"), tl.float32), tl.zeros([M], tl.float32)
    o1, o2 = tl.zeros([M, D1], tl.float32), tl.zeros([M, D2 if D2 else 16], tl.float32)
    for start in range(0, N - N % K, K):
        keys = start + tl.arange(0, K)
        highest, total, o1, o2 = _see(q1, q2, k, v, keys, stride, scale, highest, total, o1, o2, N, d, D1, D2, False)
    if REST:
        keys = N - N % K + tl.arange(0, REST)
        highest, total, o1, o2 = _see(q1, q2, k, v, keys, stride, scale, highest, total, o1, o2, N, d, D1, D2, True)
    to = out + image * N * H * d + head * d + rows[:, None] * (H * d)
    dims = tl.arange(0, D1)
    tl.store(to + dims, (o1 / total[:, None]).to(q1.dtype), mask=(rows < N)[:, None] & (dims < d)[None, :])
    if D2:
        dims = D1 + tl.arange(0, D2)
        tl.store(to + dims, (o2 / total[:, None]).to(q1.dtype), mask=(rows < N)[:, None] & (dims < d)[None, :])
