"""Triton kernels for a decoding step, which has one query token per sequence: a single-row linear layer and attention.

Both are limited by memory bandwidth. So each number is read once, in long contiguous blocks, with many loads in flight.
4-bit weights go through bitsandbytes' own kernel (`compat.gemv_4bit`). Import this module only where there is a GPU
with Triton.

On a Hopper GPU or newer the linear kernel starts while the kernel before it still runs (programmatic dependent launch).
It loads its first weights, then waits before it reads `x`, which that kernel may still be writing. So the weights must
not be an output of the kernel just before it.

Shapes: K input features, N output features; B sequences, H query heads, G key/value heads, L cache positions, d
dimensions of a head.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # exp2 is faster than exp
# Linear layer, the fastest on an H100: bytes of a weight row that a program reads at a time, and its number of rows.
# Rows of more than LONG_ROW input features: half as many rows and half as many warps.
BLOCK_BYTES, ROWS_PER_PROGRAM, LONG_ROW = 4096, 4, 8192
# Attention: MANY_WARPS up to FEW_PROGRAMS programs, FEW_WARPS above. A thread loads ELEMENTS_PER_THREAD numbers of the
# keys at a time, and as many of the values.
MANY_WARPS, FEW_WARPS, FEW_PROGRAMS, ELEMENTS_PER_THREAD = 16, 8, 256, 32


@torch.library.custom_op("minigpt4::single_row_linear", mutates_args=())
def single_row_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """A linear layer without bias for a single row: x [...,K] times weight [N,K], times scale [N] if given: [...,N].

    Each row of the weight, which may be int8, is contiguous. Sums are in float32. The result has the dtype of `x`.
    """
    out_features, in_features = weight.shape
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], out_features)
    block_k = min(BLOCK_BYTES // weight.element_size(), triton.next_power_of_2(in_features))
    block_n = ROWS_PER_PROGRAM // 2 if in_features > LONG_ROW else ROWS_PER_PROGRAM
    dependent = _supports_dependent_launch(x)
    launch_options = {"launch_pdl": True} if dependent else {}
    with torch.cuda.device_of(x):
        _single_row_linear[(triton.cdiv(out_features, block_n),)](
            x, weight, scale, y, weight.stride(0), out_features, in_features, block_n, block_k, dependent,
            num_warps=2 * block_n, **launch_options,
        )  # fmt: skip
    return y


@torch.library.custom_op("minigpt4::attend_cache", mutates_args=())
def attend_cache(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, kv_len: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention of one query per sequence [B,H,d] to the first `kv_len` [B] positions of its KV cache: [B,H,d].

    keys, values [B,L,G,d]: the cache. G divides H. Any strides will do, except in the last dimension of each.
    kv_len: at least 1. Positions from there on are not read, so no mask is needed.

    Sums are in float32. Raises ValueError if the shapes do not fit together.
    """
    (batch, num_heads, d), num_kv_heads = query.shape, keys.shape[2]
    if keys.shape != values.shape or keys.shape[0] != batch or keys.shape[3] != d or num_heads % num_kv_heads:
        raise ValueError(
            f"attend_cache: the shapes of query {list(query.shape)}, keys {list(keys.shape)} and values "
            f"{list(values.shape)} do not fit together. They must be [B,H,d], [B,L,G,d] and [B,L,G,d], and G must "
            "divide H."
        )
    query, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, values))
    out = query.new_empty(batch, num_heads, d)
    strides = [*query.stride()[:2], *keys.stride()[:3], *values.stride()[:3]]
    block_d = triton.next_power_of_2(d)
    num_warps = MANY_WARPS if batch * num_heads <= FEW_PROGRAMS else FEW_WARPS
    block_l = max(1, 32 * num_warps * ELEMENTS_PER_THREAD // block_d)
    with torch.cuda.device_of(query):
        _attend_cache[num_heads, batch](
            query, keys, values, kv_len, out, *strides, scaling, num_heads // num_kv_heads, d, block_d, block_l,
            _supports_dependent_launch(query), num_warps=num_warps,
        )  # fmt: skip
    return out


def _supports_dependent_launch(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (9, 0)


@single_row_linear.register_fake
def _(x, weight, scale=None):
    return x.new_empty(*x.shape[:-1], len(weight))


@attend_cache.register_fake
def _(query, keys, values, kv_len, scaling):
    return query.new_empty(query.shape)


@triton.jit
def _single_row_linear(
    x_ptr, weight_ptr, scale_ptr, y_ptr, stride_weight, N, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program computes BLOCK_N outputs. The loop over K is unrolled, so that all loads are in flight at once."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # Rows past the end are read from the last row, so that no mask is needed.
    weight_ptr += tl.minimum(offs_n, N - 1)[:, None].to(tl.int64) * stride_weight + offs_k[None, :]
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + offs_n, mask=offs_n < N, other=0)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for k in tl.static_range(0, K, BLOCK_K):
        if k + BLOCK_K <= K:
            weight = tl.load(weight_ptr + k, eviction_policy="evict_first")
        else:
            weight = tl.load(weight_ptr + k, mask=(k + offs_k < K)[None, :], other=0, eviction_policy="evict_first")
        if DEPENDENT and k == 0:
            tl.extra.cuda.gdc_wait()
        if k + BLOCK_K <= K:
            x = tl.load(x_ptr + k + offs_k)
        else:
            x = tl.load(x_ptr + k + offs_k, mask=k + offs_k < K, other=0)
        acc += weight.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(acc, 1)
    if scale_ptr is not None:
        y *= scale.to(tl.float32)
    tl.store(y_ptr + offs_n, y.to(y_ptr.dtype.element_ty), mask=offs_n < N)


@triton.jit
def _attend_cache(
    q_ptr, k_ptr, v_ptr, kv_len_ptr, out_ptr,
    stride_qb, stride_qh, stride_kb, stride_kl, stride_kg, stride_vb, stride_vl, stride_vg, scaling,
    GROUP_SIZE: tl.constexpr, d: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """One program computes one head of one sequence.

    The cache is read BLOCK_L positions at a time. Each of the BLOCK_L lanes keeps a softmax of its own (maximum, sum
    and output, updated online) over every BLOCK_L-th position. After the loop the lanes are merged.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    head, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    kv_len = tl.load(kv_len_ptr + sequence).to(tl.int32)
    offs_d = tl.arange(0, BLOCK_D)
    q = tl.load(q_ptr + sequence * stride_qb + head * stride_qh + offs_d, mask=offs_d < d, other=0).to(tl.float32)
    q *= scaling * LOG2_E
    k_ptr += sequence * stride_kb + head // GROUP_SIZE * stride_kg + offs_d[None, :]
    v_ptr += sequence * stride_vb + head // GROUP_SIZE * stride_vg + offs_d[None, :]
    m_i = tl.full([BLOCK_L], -3e38, tl.float32)  # maximum score of each lane
    l_i, acc = tl.zeros([BLOCK_L], tl.float32), tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    for start in range(0, kv_len, BLOCK_L):
        offs_l = start + tl.arange(0, BLOCK_L)
        mask = (offs_l < kv_len)[:, None] & (offs_d < d)[None, :]
        k = tl.load(k_ptr + offs_l[:, None].to(tl.int64) * stride_kl, mask=mask, other=0)
        v = tl.load(v_ptr + offs_l[:, None].to(tl.int64) * stride_vl, mask=mask, other=0)
        scores = tl.sum(k.to(tl.float32) * q[None, :], 1)
        scores = tl.where(offs_l < kv_len, scores, float("-inf"))
        m_new = tl.maximum(m_i, scores)
        alpha, p = tl.exp2(m_i - m_new), tl.exp2(scores - m_new)
        l_i = l_i * alpha + p
        acc = acc * alpha[:, None] + p[:, None] * v.to(tl.float32)
        m_i = m_new
    alpha = tl.exp2(m_i - tl.max(m_i, 0))
    out = tl.sum(acc * alpha[:, None], 0) / tl.sum(l_i * alpha, 0)
    out_ptr += (sequence * tl.num_programs(0) + head) * d
    tl.store(out_ptr + offs_d, out.to(out_ptr.dtype.element_ty), mask=offs_d < d)
