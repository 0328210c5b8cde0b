"""Attention within the sequences of a packed batch, as two Triton kernels: forward and backward.

Made for many short sequences, for which a GPU does little more than read and write: queries, keys and values lie side
by side in one tensor, their gradients in another, and what belongs together is one program's. Imported only where there
is a GPU for it.

The rows [T] fall into ranges. The first has P rows that precede those of every other range: position j of a sequence is
row j below P, and its own row j - P from there on. Queries and keys are both pluralize in positions, in blocks of N. So
query block i sees key blocks 0 to i, and only in block i some keys come after some queries. That one is computed first;
where a sequence fits in a block, it is the only one.

S ranges, H heads of queries, G of keys and values, d dimensions, D of them with padding.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # powers of two are quicker than those of e
WARPS, STAGES = 4, 1  # the quickest on an H100


def attention(
    qkv: torch.Tensor, groups: int, starts: torch.Tensor, shared: int, longest: int, scaling: float
) -> torch.Tensor:
    """Causal attention within each range and to the shared rows: [T,H,d].

    qkv [T,H+2G,d]: heads of queries, `groups` (G) of keys, as many of values; 16 bit, d up to 256.
    starts [S+1] int32: where the ranges begin, and T at the end. The first has the `shared` rows; each may be empty.
    longest: no range, with the shared rows, has more.

    Sums are in float32, and always taken in the same order. The gradients of the shared rows are those of all ranges.
    """
    return attention_and_denominators(qkv, groups, starts, shared, longest, scaling)[0]


def block_size(dimensions: int, memory: int) -> int:
    """Positions of a block. memory: bytes of the GPU's shared memory that a program may have."""
    block = 64 if dimensions <= 128 else 32
    # Seven blocks in 16 bit are the most that either kernel wants.
    return block if 14 * block * dimensions <= memory else block // 2


@torch.library.custom_op("minigpt4::packed_attention", mutates_args=())
def attention_and_denominators(
    qkv: torch.Tensor, groups: int, starts: torch.Tensor, shared: int, longest: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [T,H,d], and for the backward pass log2 of the softmax's denominators [H,T] float32."""
    out, lse = empty_outputs(qkv, groups)
    _launch(_forward, qkv, groups, (out, lse, starts), shared, longest, scaling)
    return out, lse


@torch.library.custom_op("minigpt4::packed_attention_backward", mutates_args=())
def attention_backward(
    grad: torch.Tensor, qkv: torch.Tensor, groups: int, out: torch.Tensor, lse: torch.Tensor,
    starts: torch.Tensor, shared: int, longest: int, scaling: float, of_shared: bool,
) -> torch.Tensor:  # fmt: skip
    """The gradient of qkv. of_shared: of the shared rows' keys and values too, which otherwise get zeros."""
    rows, ranges = len(qkv), len(starts) - 1
    # Behind all rows, each range has shared ones of its own: atomic operations would add them up in any order.
    gradient = qkv.new_empty(rows + ranges * shared * of_shared, *qkv.shape[1:])
    others = (out, lse, grad.contiguous(), gradient, starts)
    _launch(_backward, qkv, groups, others, shared, longest, scaling, OF_SHARED=of_shared)
    if shared and of_shared:
        keys_and_values = gradient[:, -2 * groups :]
        torch.sum(keys_and_values[rows:].unflatten(0, (ranges, shared)), 0, out=keys_and_values[:shared])
    return gradient[:rows]


def _launch(kernel, qkv, groups: int, others: tuple, shared: int, longest: int, scaling: float, **flags: bool) -> None:
    """Start the programs of each block of each range. others: further tensors, `starts` the last."""
    rows, heads, d = len(qkv), qkv.shape[1] - 2 * groups, qkv.shape[2]
    padded = max(16, triton.next_power_of_2(d))  # what Triton's products take
    memory = torch.cuda.get_device_properties(qkv.device).shared_memory_per_block_optin if qkv.is_cuda else 2**20
    block, grouped = block_size(padded, memory), heads > groups
    # The backward pass of a group holds the gradients of keys and values while it goes through its heads.
    programs, warps = (heads, WARPS) if kernel is _forward else (groups, 2 * WARPS if grouped else WARPS)
    with torch.cuda.device_of(qkv):
        kernel[programs, len(others[-1]) - 1, triton.cdiv(longest, block)](
            qkv.contiguous(), *others, shared, rows, scaling, heads, groups, d, padded, block, longest <= block,
            **flags, num_warps=warps, num_stages=STAGES,
        )  # fmt: skip


def empty_outputs(qkv: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows, heads, d = qkv.shape[0], qkv.shape[1] - 2 * groups, qkv.shape[2]
    return qkv.new_empty(rows, heads, d), qkv.new_empty(heads, rows, dtype=torch.float32)


@attention_and_denominators.register_fake
def _(qkv, groups, starts, shared, longest, scaling):
    return empty_outputs(qkv, groups)


@attention_backward.register_fake
def _(grad, qkv, *others):
    return qkv.new_empty(qkv.shape)


def _keep(ctx, inputs, output) -> None:
    qkv, ctx.groups, starts, ctx.shared, ctx.longest, ctx.scaling = inputs
    ctx.save_for_backward(qkv, *output, starts)
    ctx.set_materialize_grads(False)  # none for the denominators


def _gradients(ctx, grad, _):
    qkv, *others = ctx.saved_tensors
    gradient = attention_backward(grad, qkv, ctx.groups, *others, ctx.shared, ctx.longest, ctx.scaling, True)
    return gradient, *[None] * 5


attention_and_denominators.register_autograd(_gradients, setup_context=_keep)


@triton.jit
def _sequence(starts, shared):
    """Row of the first own position, how many positions precede it, and how many there are in all."""
    sequence = tl.program_id(1)
    start = tl.load(starts + sequence)
    before = tl.where(sequence == 0, 0, shared)
    return start, before, before + tl.load(starts + sequence + 1) - start


@triton.jit
def _block(number, start, before, N: tl.constexpr):
    """Positions [N] of a block, and their rows."""
    positions = number * N + tl.arange(0, N)
    return positions, tl.where(positions < before, positions, start + positions - before).to(tl.int64)


@triton.jit
def _load(x, rows, stride, mask, d: tl.constexpr, D: tl.constexpr):
    """Rows [N,D], 0 where there are none."""
    dims = tl.arange(0, D)
    return tl.load(x + rows[:, None] * stride + dims, mask=mask[:, None] & (dims < d)[None, :], other=0.0)


@triton.jit
def _store(x, values, rows, stride, mask, d: tl.constexpr, D: tl.constexpr):
    dims = tl.arange(0, D)
    tl.store(x + rows[:, None] * stride + dims, values, mask=mask[:, None] & (dims < d)[None, :])


@triton.jit(do_not_specialize=["shared", "T"])
def _forward(
    qkv, out, lse, starts, shared, T, scaling,
    H: tl.constexpr, G: tl.constexpr, d: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    ONE: tl.constexpr,
):  # fmt: skip
    """One head's outputs of one block of queries. ONE: each range has one block, which wants fewer registers."""
    head, block = tl.program_id(0), tl.program_id(2)
    start, before, keys = _sequence(starts, shared)
    if block * N >= keys or (block + 1) * N <= before:
        return
    row, group = (H + 2 * G) * d, head // (H // G)
    q, k, v = qkv + head * d, qkv + (H + group) * d, qkv + (H + G + group) * d
    positions, rows = _block(block, start, before, N)
    own, present = (positions >= before) & (positions < keys), positions < keys
    query = _load(q, rows, row, own, d, D)
    key = _load(k, rows, row, present, d, D)
    value = _load(v, rows, row, present, d, D)
    scale = scaling * LOG2_E
    scores = tl.dot(query, tl.trans(key)) * scale
    scores = tl.where(positions[:, None] >= positions[None, :], scores, float("-inf"))
    highest = tl.max(scores, 1)
    weights = tl.exp2(scores - highest[:, None])
    total = tl.sum(weights, 1)
    output = tl.dot(weights.to(value.dtype), value)
    if not ONE:
        for earlier in range(block):
            others, other_rows = _block(earlier, start, before, N)
            key = _load(k, other_rows, row, others < keys, d, D)
            value = _load(v, other_rows, row, others < keys, d, D)
            scores = tl.dot(query, tl.trans(key)) * scale
            higher = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            shrunk = tl.exp2(highest - higher)
            total = total * shrunk + tl.sum(weights, 1)
            output = tl.dot(weights.to(value.dtype), value, output * shrunk[:, None])
            highest = higher
    output = (output / total[:, None]).to(value.dtype)
    _store(out + head * d, output, rows, H * d, own, d, D)
    tl.store(lse + head * T + rows, highest + tl.log2(total), mask=own)


@triton.jit
def _load_gradient(lse, grad, rows, stride, own, d: tl.constexpr, D: tl.constexpr):
    """Gradients [N,D] of a block of queries, and log2 of their denominators."""
    return _load(grad, rows, stride, own, d, D), tl.load(lse + rows, mask=own, other=float("inf"))


@triton.jit
def _delta(out, gradient, rows, stride, own, d: tl.constexpr, D: tl.constexpr):
    """Output · gradient [N] of a block of queries: the sum of their weights' gradients, each times its weight."""
    return tl.sum(_load(out, rows, stride, own, d, D).to(tl.float32) * gradient.to(tl.float32), 1)


@triton.jit
def _weights(key, value, query, gradient, lse, delta, scale, seen):
    """The weights [keys,queries] and the gradients of the scores, in 16 bit: transposed, as dk and dv want them.

    delta: None where the queries see no other keys.
    """
    weights = tl.exp2(tl.dot(key, tl.trans(query)) * scale - lse[None, :])
    weights = tl.where(seen, weights, 0.0)
    weight_gradient = tl.dot(value, tl.trans(gradient))
    if delta is None:
        delta = tl.sum(weights * weight_gradient, 0)
    score_gradient = weights * (weight_gradient - delta[None, :])
    return weights.to(key.dtype), score_gradient.to(key.dtype)


@triton.jit(do_not_specialize=["shared", "T"])
def _backward(
    qkv, out, lse, grad, dqkv, starts, shared, T, scaling,
    H: tl.constexpr, G: tl.constexpr, d: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    ONE: tl.constexpr, OF_SHARED: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of positions: of the queries of each head in a group, and of the group's keys and values.

    What block i's queries and keys have to do with each other goes into both; then come the queries with earlier keys,
    then the keys with later queries. So each block has as much to do as the others of its sequence.
    """
    group, block = tl.program_id(0), tl.program_id(2)
    start, before, keys = _sequence(starts, shared)
    if block * N >= keys or (not OF_SHARED and (block + 1) * N <= before):
        return
    blocks = tl.cdiv(keys, N)
    row, o_row, scale = (H + 2 * G) * d, H * d, scaling * LOG2_E
    k_at, v_at = (H + group) * d, (H + G + group) * d
    positions, rows = _block(block, start, before, N)
    present = positions < keys
    own = present & (positions >= before)
    key = _load(qkv + k_at, rows, row, present, d, D)
    value = _load(qkv + v_at, rows, row, present, d, D)
    dk, dv = tl.zeros([N, D], tl.float32), tl.zeros([N, D], tl.float32)
    for member in range(H // G):
        head = group * (H // G) + member
        q_at, lse_of_head = head * d, lse + head * T
        query = _load(qkv + q_at, rows, row, own, d, D)
        gradient, denominators = _load_gradient(lse_of_head, grad + q_at, rows, o_row, own, d, D)
        delta = None if ONE else _delta(out + q_at, gradient, rows, o_row, own, d, D)
        seen = positions[:, None] <= positions[None, :]
        weights, score_gradient = _weights(key, value, query, gradient, denominators, delta, scale, seen)
        dq = tl.dot(tl.trans(score_gradient), key)
        if not ONE:
            for earlier in range(block):
                others, other_rows = _block(earlier, start, before, N)
                other_key = _load(qkv + k_at, other_rows, row, others < keys, d, D)
                other_value = _load(qkv + v_at, other_rows, row, others < keys, d, D)
                _, other = _weights(other_key, other_value, query, gradient, denominators, delta, scale, True)
                dq = tl.dot(tl.trans(other), other_key, dq)
        _store(dqkv + q_at, (dq * scaling).to(key.dtype), rows, row, own, d, D)
        dv = tl.dot(weights, gradient, dv)
        dk = tl.dot(score_gradient, query, dk)
        if not ONE:
            for later in range(block + 1, blocks):
                others, other_rows = _block(later, start, before, N)
                theirs = (others >= before) & (others < keys)
                query = _load(qkv + q_at, other_rows, row, theirs, d, D)
                gradient, denominators = _load_gradient(lse_of_head, grad + q_at, other_rows, o_row, theirs, d, D)
                delta = _delta(out + q_at, gradient, other_rows, o_row, theirs, d, D)
                weights, score_gradient = _weights(key, value, query, gradient, denominators, delta, scale, True)
                dv = tl.dot(weights, gradient, dv)
                dk = tl.dot(score_gradient, query, dk)
    if OF_SHARED:  # each range has a gradient of its own of shared rows, behind those of all rows
        first = T + tl.program_id(1).to(tl.int64) * shared
        rows, own = tl.where(positions < shared, first + positions, rows), present
    else:
        wanted = (positions >= shared)[:, None]
        dk, dv = tl.where(wanted, dk, 0.0), tl.where(wanted, dv, 0.0)
    _store(dqkv + v_at, dv.to(value.dtype), rows, row, own, d, D)
    _store(dqkv + k_at, (dk * scaling).to(key.dtype), rows, row, own, d, D)
