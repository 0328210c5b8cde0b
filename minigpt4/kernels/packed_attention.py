"""Attention within the sequences of a packed batch, as two Triton kernels: forward and backward.

The kernels are made for many short sequences, where a GPU spends its time on reading and writing. Queries, keys and
values are read from one tensor, and their gradients are written to another, so nothing is copied or concatenated around
the attention. A sequence that fits in one block is computed by one program per head. At the sizes of stage 1 this takes
a third of the time of torch's variable-length attention with the copies around it. Import this module only where there
is a GPU with Triton.

The T tokens of a packed batch belong to S sequences, one after the other. The first sequence is a prefix of P tokens
that precedes every other sequence. Position j of another sequence is token j of the batch if j < P, and the sequence's
own token j - P otherwise.

Queries and keys are divided into blocks of N positions, by the same bounds. So query block i sees key blocks 0 to i,
and only key block i needs the causal mask. Block i comes first. If a sequence has one block, that is all.

Shapes: H query heads, G key/value heads, d dimensions of a head, D of them with padding.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # exp2 is faster than exp
NUM_WARPS, NUM_STAGES = 4, 1  # the fastest on an H100


def block_size(head_dim: int, shared_memory: int) -> int:
    """Positions in a block. head_dim: padded. shared_memory: bytes that the GPU allows a program."""
    block = 64 if head_dim <= 128 else 32
    # Either kernel needs seven blocks in 16 bit at most.
    return block if 14 * block * head_dim <= shared_memory else block // 2


@torch.library.custom_op("minigpt4::packed_attention", mutates_args=())
def packed_attention_with_lse(
    qkv: torch.Tensor, num_kv_heads: int, starts: torch.Tensor, prefix_len: int, max_kv_len: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of each sequence to the prefix and to itself.

    qkv [T,H+2G,d]: H heads of queries, `num_kv_heads` (G) of keys, G of values; 16 bit, d up to 256.
    starts [S+1] int32: the first token of each sequence, and T at the end. Sequences may be empty.
    prefix_len: P, the length of the first sequence. max_kv_len: no sequence is longer, prefix included.

    Sums are in float32, and always in the same order. The prefix's gradients are summed over all sequences.
    Returns the output [T,H,d], and for the backward pass log2 of the softmax denominators [H,T] float32.
    """
    out, lse = _empty_outputs(qkv, num_kv_heads)
    _launch(_forward, qkv, num_kv_heads, (out, lse, starts), prefix_len, max_kv_len, scaling)
    return out, lse


@torch.library.custom_op("minigpt4::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    grad: torch.Tensor, qkv: torch.Tensor, num_kv_heads: int, out: torch.Tensor, lse: torch.Tensor,
    starts: torch.Tensor, prefix_len: int, max_kv_len: int, scaling: float, with_prefix_gradient: bool,
) -> torch.Tensor:  # fmt: skip
    """The gradient of qkv. with_prefix_gradient: also of the prefix's keys and values; otherwise these get zeros."""
    num_tokens, num_sequences = len(qkv), len(starts) - 1
    # Each sequence writes its gradient of the prefix to rows of its own, after those of all tokens. These are summed
    # below: atomic additions in the kernel would have no fixed order.
    extra_rows = num_sequences * prefix_len if with_prefix_gradient else 0
    gradient = qkv.new_empty(num_tokens + extra_rows, *qkv.shape[1:])
    others = (out, lse, grad.contiguous(), gradient, starts)
    _launch(
        _backward, qkv, num_kv_heads, others, prefix_len, max_kv_len, scaling, WITH_PREFIX_GRADIENT=with_prefix_gradient
    )
    if extra_rows:
        keys_and_values = gradient[:, -2 * num_kv_heads :]
        per_sequence = keys_and_values[num_tokens:].unflatten(0, (num_sequences, prefix_len))
        torch.sum(per_sequence, 0, out=keys_and_values[:prefix_len])
    return gradient[:num_tokens]


def _launch(
    kernel, qkv, num_kv_heads: int, others: tuple, prefix_len: int, max_kv_len: int, scaling: float, **flags: bool
) -> None:
    """Run a kernel for each head and each block of each sequence. others: further tensors, `starts` the last."""
    num_tokens, num_heads, d = len(qkv), qkv.shape[1] - 2 * num_kv_heads, qkv.shape[2]
    head_dim = max(16, triton.next_power_of_2(d))  # what tl.dot takes
    shared_memory = 2**20
    if qkv.is_cuda:
        shared_memory = torch.cuda.get_device_properties(qkv.device).shared_memory_per_block_optin
    block = block_size(head_dim, shared_memory)
    if kernel is _forward:
        heads_in_grid, num_warps = num_heads, NUM_WARPS
    else:
        # A program holds the gradients of a key/value head while it loops over the query heads that share it.
        heads_in_grid, num_warps = num_kv_heads, 2 * NUM_WARPS if num_heads > num_kv_heads else NUM_WARPS
    grid = (heads_in_grid, len(others[-1]) - 1, triton.cdiv(max_kv_len, block))
    with torch.cuda.device_of(qkv):
        kernel[grid](
            qkv.contiguous(), *others, prefix_len, num_tokens, scaling, num_heads, num_kv_heads, d, head_dim, block,
            max_kv_len <= block, **flags, num_warps=num_warps, num_stages=NUM_STAGES,
        )  # fmt: skip


def _empty_outputs(qkv: torch.Tensor, num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_heads, d = qkv.shape[0], qkv.shape[1] - 2 * num_kv_heads, qkv.shape[2]
    return qkv.new_empty(num_tokens, num_heads, d), qkv.new_empty(num_heads, num_tokens, dtype=torch.float32)


@packed_attention_with_lse.register_fake
def _(qkv, num_kv_heads, starts, prefix_len, max_kv_len, scaling):
    return _empty_outputs(qkv, num_kv_heads)


@packed_attention_backward.register_fake
def _(grad, qkv, *others):
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output) -> None:
    qkv, ctx.num_kv_heads, starts, ctx.prefix_len, ctx.max_kv_len, ctx.scaling = inputs
    ctx.save_for_backward(qkv, *output, starts)
    ctx.set_materialize_grads(False)  # the lse has no gradient


def _autograd_backward(ctx, grad, _):
    qkv, *others = ctx.saved_tensors
    gradient = packed_attention_backward(
        grad, qkv, ctx.num_kv_heads, *others, ctx.prefix_len, ctx.max_kv_len, ctx.scaling, with_prefix_gradient=True
    )
    return gradient, *[None] * 5


packed_attention_with_lse.register_autograd(_autograd_backward, setup_context=_setup_context)


@triton.jit
def _sequence_bounds(starts_ptr, prefix_len):
    """The sequence's first own token, the number of positions before it, and the number of positions in all."""
    sequence = tl.program_id(1)
    start = tl.load(starts_ptr + sequence)
    before = tl.where(sequence == 0, 0, prefix_len)
    return start, before, before + tl.load(starts_ptr + sequence + 1) - start


@triton.jit
def _block_positions(block, start, before, N: tl.constexpr):
    """The positions [N] of a block, and their tokens in the batch."""
    positions = block * N + tl.arange(0, N)
    return positions, tl.where(positions < before, positions, start + positions - before).to(tl.int64)


@triton.jit
def _load(x_ptr, tokens, stride, mask, d: tl.constexpr, D: tl.constexpr):
    """One head of some tokens [N,D]; zeros where `mask` is false, and in the padding."""
    offs_d = tl.arange(0, D)
    return tl.load(x_ptr + tokens[:, None] * stride + offs_d, mask=mask[:, None] & (offs_d < d)[None, :], other=0.0)


@triton.jit
def _store(x_ptr, values, tokens, stride, mask, d: tl.constexpr, D: tl.constexpr):
    offs_d = tl.arange(0, D)
    tl.store(x_ptr + tokens[:, None] * stride + offs_d, values, mask=mask[:, None] & (offs_d < d)[None, :])


@triton.jit(do_not_specialize=["prefix_len", "T"])
def _forward(
    qkv_ptr, out_ptr, lse_ptr, starts_ptr, prefix_len, T, scaling,
    H: tl.constexpr, G: tl.constexpr, d: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program computes one head of one block of queries.

    ONE_BLOCK: every sequence has one block at most. Without the loop the kernel needs fewer registers.
    """
    head, block = tl.program_id(0), tl.program_id(2)
    start, before, kv_len = _sequence_bounds(starts_ptr, prefix_len)
    if block * N >= kv_len or (block + 1) * N <= before:
        return
    stride, kv_head = (H + 2 * G) * d, head // (H // G)
    q_ptr, k_ptr, v_ptr = qkv_ptr + head * d, qkv_ptr + (H + kv_head) * d, qkv_ptr + (H + G + kv_head) * d
    positions, tokens = _block_positions(block, start, before, N)
    q_mask, kv_mask = (positions >= before) & (positions < kv_len), positions < kv_len
    q = _load(q_ptr, tokens, stride, q_mask, d, D)
    k = _load(k_ptr, tokens, stride, kv_mask, d, D)
    v = _load(v_ptr, tokens, stride, kv_mask, d, D)
    scale = scaling * LOG2_E
    scores = tl.dot(q, tl.trans(k)) * scale
    scores = tl.where(positions[:, None] >= positions[None, :], scores, float("-inf"))
    m_i = tl.max(scores, 1)  # the running maximum of each query's scores
    p = tl.exp2(scores - m_i[:, None])
    l_i = tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v)
    if not ONE_BLOCK:
        for kv_block in range(block):
            kv_positions, kv_tokens = _block_positions(kv_block, start, before, N)
            k = _load(k_ptr, kv_tokens, stride, kv_positions < kv_len, d, D)
            v = _load(v_ptr, kv_tokens, stride, kv_positions < kv_len, d, D)
            scores = tl.dot(q, tl.trans(k)) * scale
            m_new = tl.maximum(m_i, tl.max(scores, 1))
            p = tl.exp2(scores - m_new[:, None])
            alpha = tl.exp2(m_i - m_new)
            l_i = l_i * alpha + tl.sum(p, 1)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
            m_i = m_new
    out = (acc / l_i[:, None]).to(v.dtype)
    _store(out_ptr + head * d, out, tokens, H * d, q_mask, d, D)
    tl.store(lse_ptr + head * T + tokens, m_i + tl.log2(l_i), mask=q_mask)


@triton.jit
def _load_gradient(lse_ptr, grad_ptr, tokens, stride, mask, d: tl.constexpr, D: tl.constexpr):
    """The output's gradients [N,D] of a block of queries, and log2 of their softmax denominators [N]."""
    return _load(grad_ptr, tokens, stride, mask, d, D), tl.load(lse_ptr + tokens, mask=mask, other=float("inf"))


@triton.jit
def _delta(out_ptr, grad, tokens, stride, mask, d: tl.constexpr, D: tl.constexpr):
    """Output · gradient [N] for a block of queries. It equals the sum over keys of weight · gradient of the weight."""
    return tl.sum(_load(out_ptr, tokens, stride, mask, d, D).to(tl.float32) * grad.to(tl.float32), 1)


@triton.jit
def _weights_and_score_gradients(k, v, q, grad, lse, delta, scale, mask):
    """The weights and the gradients of the scores [keys,queries], in 16 bit. dk and dv need them transposed like this.

    delta: None if all keys of these queries are in this block. It then follows from the weights and their gradients,
    and the output need not be read.
    """
    p = tl.exp2(tl.dot(k, tl.trans(q)) * scale - lse[None, :])
    p = tl.where(mask, p, 0.0)
    dp = tl.dot(v, tl.trans(grad))
    if delta is None:
        delta = tl.sum(p * dp, 0)
    ds = p * (dp - delta[None, :])
    return p.to(k.dtype), ds.to(k.dtype)


@triton.jit(do_not_specialize=["prefix_len", "T"])
def _backward(
    qkv_ptr, out_ptr, lse_ptr, grad_ptr, dqkv_ptr, starts_ptr, prefix_len, T, scaling,
    H: tl.constexpr, G: tl.constexpr, d: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    ONE_BLOCK: tl.constexpr, WITH_PREFIX_GRADIENT: tl.constexpr,
):  # fmt: skip
    """One program computes the gradients of a key/value head and of its query heads, for one block of positions.

    First the block's queries with the block's keys, for both gradients. Then its queries with earlier keys, for dq, and
    its keys with later queries, for dk and dv. So every block of a sequence has the same amount of work.
    """
    kv_head, block = tl.program_id(0), tl.program_id(2)
    start, before, kv_len = _sequence_bounds(starts_ptr, prefix_len)
    if block * N >= kv_len or (not WITH_PREFIX_GRADIENT and (block + 1) * N <= before):
        return
    num_blocks = tl.cdiv(kv_len, N)
    stride, out_stride, scale = (H + 2 * G) * d, H * d, scaling * LOG2_E
    k_offset, v_offset = (H + kv_head) * d, (H + G + kv_head) * d
    positions, tokens = _block_positions(block, start, before, N)
    kv_mask = positions < kv_len
    q_mask = kv_mask & (positions >= before)
    k = _load(qkv_ptr + k_offset, tokens, stride, kv_mask, d, D)
    v = _load(qkv_ptr + v_offset, tokens, stride, kv_mask, d, D)
    dk, dv = tl.zeros([N, D], tl.float32), tl.zeros([N, D], tl.float32)
    for member in range(H // G):
        head = kv_head * (H // G) + member
        q_offset, head_lse_ptr = head * d, lse_ptr + head * T
        q = _load(qkv_ptr + q_offset, tokens, stride, q_mask, d, D)
        grad, lse = _load_gradient(head_lse_ptr, grad_ptr + q_offset, tokens, out_stride, q_mask, d, D)
        delta = None if ONE_BLOCK else _delta(out_ptr + q_offset, grad, tokens, out_stride, q_mask, d, D)
        causal = positions[:, None] <= positions[None, :]
        p, ds = _weights_and_score_gradients(k, v, q, grad, lse, delta, scale, causal)
        dq = tl.dot(tl.trans(ds), k)
        if not ONE_BLOCK:
            for kv_block in range(block):
                kv_positions, kv_tokens = _block_positions(kv_block, start, before, N)
                other_k = _load(qkv_ptr + k_offset, kv_tokens, stride, kv_positions < kv_len, d, D)
                other_v = _load(qkv_ptr + v_offset, kv_tokens, stride, kv_positions < kv_len, d, D)
                _, other_ds = _weights_and_score_gradients(other_k, other_v, q, grad, lse, delta, scale, True)
                dq = tl.dot(tl.trans(other_ds), other_k, dq)
        _store(dqkv_ptr + q_offset, (dq * scaling).to(k.dtype), tokens, stride, q_mask, d, D)
        dv = tl.dot(p, grad, dv)
        dk = tl.dot(ds, q, dk)
        if not ONE_BLOCK:
            for q_block in range(block + 1, num_blocks):
                q_positions, q_tokens = _block_positions(q_block, start, before, N)
                mask = (q_positions >= before) & (q_positions < kv_len)
                q = _load(qkv_ptr + q_offset, q_tokens, stride, mask, d, D)
                grad, lse = _load_gradient(head_lse_ptr, grad_ptr + q_offset, q_tokens, out_stride, mask, d, D)
                delta = _delta(out_ptr + q_offset, grad, q_tokens, out_stride, mask, d, D)
                p, ds = _weights_and_score_gradients(k, v, q, grad, lse, delta, scale, True)
                dv = tl.dot(p, grad, dv)
                dk = tl.dot(ds, q, dk)
    if WITH_PREFIX_GRADIENT:  # into rows of this sequence's own, after those of all tokens
        first = T + tl.program_id(1).to(tl.int64) * prefix_len
        tokens, q_mask = tl.where(positions < prefix_len, first + positions, tokens), kv_mask
    else:
        after_prefix = (positions >= prefix_len)[:, None]
        dk, dv = tl.where(after_prefix, dk, 0.0), tl.where(after_prefix, dv, 0.0)
    _store(dqkv_ptr + v_offset, dv.to(v.dtype), tokens, stride, q_mask, d, D)
    _store(dqkv_ptr + k_offset, (dk * scaling).to(k.dtype), tokens, stride, q_mask, d, D)
