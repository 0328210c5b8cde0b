"""Triton kernels for the blocks of a vision encoder: a residual sum with its layer norm, and attention.

In the norm one program holds a whole row, so the row is read once; torch.compile's kernels read rows of more than 1,024
columns twice. The attention is made for odd sizes, such as 257 tokens and heads of 88 dimensions; general kernels round
both up to a power of two or to a whole block. This one splits the dimensions of a head in two (64 and 32 for 88), and
reads the last keys as a smaller block (16 for one). Import this module only where there is a GPU with Triton.

Shapes: M rows, K columns; B images, N image tokens, H heads of d dimensions.
"""

import torch
import triton
import triton.language as tl

from minigpt4.kernels.e4m3 import abs_max, empty_quantized, store_scale

# The fastest on an H100. With NUM_STAGES = 1, Triton 3.6 makes a kernel that reads out of bounds.
COLUMNS_PER_WARP, BLOCK_Q, BLOCK_KV, NUM_WARPS, NUM_STAGES = 1024, 64, 32, 4, 3
LOG2_E = tl.constexpr(1.4426950408889634)  # exp2 is faster than exp


@torch.library.custom_op("minigpt4::add_layer_norm", mutates_args=())
def add_layer_norm(
    terms: list[torch.Tensor], weight: torch.Tensor, bias: torch.Tensor, eps: float, in_fp8: bool
) -> list[torch.Tensor]:
    """The layer norm of a sum of two or three terms [...,K].

    Returns, in this order:
        the sum [...,K] in the dtype of the first term, if there are three terms;
        the norm [...,K] in the dtype of the last term, or with in_fp8 as e4m3 rows [M,K];
        with in_fp8 each row's scale [M,1] float32.

    Sum, mean and variance are in float32. There is no gradient.
    """
    x, delta, *rest = (term.contiguous() for term in terms)
    third = rest[0] if rest else None
    outputs = _empty_norm_outputs(terms, in_fp8)
    total, *normed = outputs if rest else (None, *outputs)
    scale = normed[1] if in_fp8 else None
    columns = x.shape[-1]
    block = triton.next_power_of_2(columns)
    num_warps = max(1, min(block // COLUMNS_PER_WARP, 32))
    with torch.cuda.device_of(x):
        _add_layer_norm[(x.numel() // columns,)](
            x, delta, third, weight, bias, total, normed[0], scale, eps, columns, block, num_warps=num_warps
        )
    return outputs


def _empty_norm_outputs(terms: list[torch.Tensor], in_fp8: bool) -> list[torch.Tensor]:
    first, last = terms[0], terms[-1]
    total = [first.new_empty(first.shape)] if len(terms) > 2 else []
    if in_fp8:
        return [*total, *empty_quantized(last.flatten(0, -2), last.shape[-1])]
    return [*total, last.new_empty(last.shape)]


@add_layer_norm.register_fake
def _(terms, weight, bias, eps, in_fp8):
    return _empty_norm_outputs(terms, in_fp8)


@torch.library.custom_op("minigpt4::vit_attention", mutates_args=())
def vit_attention(qkv: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Attention of all tokens of an image to each other: qkv [B,N,3*H*d], queries first, to [B,N,H*d]. 16 bit.

    Scores and sums are in float32, scaled by d**-0.5. There is no gradient.
    """
    num_images, num_tokens, width = qkv.shape
    d = width // (3 * num_heads)
    out = qkv.new_empty(num_images, num_tokens, width // 3)
    d1 = max(16, 1 << d.bit_length() - 1)  # 16: the smallest size that tl.dot takes
    d2 = max(16, triton.next_power_of_2(d - d1)) if d > d1 else 0
    remaining = num_tokens % BLOCK_KV
    last_block = max(16, triton.next_power_of_2(remaining)) if remaining else 0
    grid = (triton.cdiv(num_tokens, BLOCK_Q), num_images * num_heads)
    with torch.cuda.device_of(qkv):
        _vit_attention[grid](
            qkv.contiguous(), out, d**-0.5, num_tokens, num_heads, d, d1, d2, BLOCK_Q, BLOCK_KV, last_block,
            num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
    return out


@vit_attention.register_fake
def _(qkv, num_heads):
    return qkv.new_empty(*qkv.shape[:-1], qkv.shape[-1] // 3)


@triton.jit
def _add_layer_norm(
    x_ptr, delta_ptr, third_ptr, weight_ptr, bias_ptr, total_ptr, normed_ptr, scale_ptr, eps,
    K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program computes one row. third_ptr, total_ptr and scale_ptr are None if there is no such tensor."""
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_K)
    offsets, mask = row * K + columns, columns < K
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x += tl.load(delta_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if third_ptr is not None:
        x += tl.load(third_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if total_ptr is not None:
        tl.store(total_ptr + offsets, x.to(total_ptr.dtype.element_ty), mask=mask)
    centred = tl.where(mask, x - tl.sum(x, 0) / K, 0.0)
    centred *= tl.rsqrt(tl.sum(centred * centred, 0) / K + eps)
    y = centred * tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        y *= 1 / store_scale(abs_max(y), scale_ptr, row)
    tl.store(normed_ptr + offsets, y.to(normed_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load(x_ptr, tokens, stride, N, d: tl.constexpr, START: tl.constexpr, D: tl.constexpr):
    """Dimensions START to START + D of a head of some tokens [tokens,D]; zeros from token N and dimension d on."""
    offs_d = START + tl.arange(0, D)
    mask = (tokens < N)[:, None] & (offs_d < d)[None, :]
    return tl.load(x_ptr + tokens[:, None] * stride + offs_d, mask=mask, other=0.0)


@triton.jit
def _attend_block(
    q1, q2, k_ptr, v_ptr, tokens, stride, scale, m_i, l_i, acc1, acc2,
    N: tl.constexpr, d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Update the softmax's maximum and sum, and the two parts of the output, with the keys and values of one block.

    LAST: the block may go beyond the last token.
    """
    scores = tl.dot(q1, tl.trans(_load(k_ptr, tokens, stride, N, d, 0, D1)))
    if D2:
        scores = tl.dot(q2, tl.trans(_load(k_ptr, tokens, stride, N, d, D1, D2)), scores)
    if LAST:
        scores = tl.where((tokens < N)[None, :], scores, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(scores, 1) * scale)
    p = tl.exp2(scores * scale - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, 1)
    p = p.to(q1.dtype)
    acc1 = tl.dot(p, _load(v_ptr, tokens, stride, N, d, 0, D1), acc1 * alpha[:, None])
    if D2:
        acc2 = tl.dot(p, _load(v_ptr, tokens, stride, N, d, D1, D2), acc2 * alpha[:, None])
    return m_new, l_i, acc1, acc2


@triton.jit
def _vit_attention(
    qkv_ptr, out_ptr, scaling, N: tl.constexpr, H: tl.constexpr, d: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr, LAST_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program computes one head of BLOCK_Q queries.

    It loops over whole blocks of BLOCK_KV keys, and then takes those that remain as a block of LAST_BLOCK. A head's
    dimensions are held in two parts of D1 and D2; D2 is 0 if there is one part.
    """
    image, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    stride, scale = 3 * H * d, scaling * LOG2_E
    q_ptr = qkv_ptr + image * N * stride + head * d
    k_ptr, v_ptr = q_ptr + H * d, q_ptr + 2 * H * d
    queries = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q1 = _load(q_ptr, queries, stride, N, d, 0, D1)
    q2 = _load(q_ptr, queries, stride, N, d, D1, D2) if D2 else q1
    m_i, l_i = tl.full([BLOCK_Q], float("-inf"), tl.float32), tl.zeros([BLOCK_Q], tl.float32)
    acc1 = tl.zeros([BLOCK_Q, D1], tl.float32)
    acc2 = tl.zeros([BLOCK_Q, D2 if D2 else 16], tl.float32)
    for start in range(0, N - N % BLOCK_KV, BLOCK_KV):
        keys = start + tl.arange(0, BLOCK_KV)
        m_i, l_i, acc1, acc2 = _attend_block(
            q1, q2, k_ptr, v_ptr, keys, stride, scale, m_i, l_i, acc1, acc2, N, d, D1, D2, False
        )
    if LAST_BLOCK:
        keys = N - N % BLOCK_KV + tl.arange(0, LAST_BLOCK)
        m_i, l_i, acc1, acc2 = _attend_block(
            q1, q2, k_ptr, v_ptr, keys, stride, scale, m_i, l_i, acc1, acc2, N, d, D1, D2, True
        )
    out_ptr += image * N * H * d + head * d + queries[:, None] * (H * d)
    offs_d = tl.arange(0, D1)
    mask = (queries < N)[:, None] & (offs_d < d)[None, :]
    tl.store(out_ptr + offs_d, (acc1 / l_i[:, None]).to(q1.dtype), mask=mask)
    if D2:
        offs_d = D1 + tl.arange(0, D2)
        mask = (queries < N)[:, None] & (offs_d < d)[None, :]
        tl.store(out_ptr + offs_d, (acc2 / l_i[:, None]).to(q1.dtype), mask=mask)
