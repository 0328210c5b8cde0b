"""Attention within the sequences of a packed batch, as two Triton kernels: forward and backward.

Made for many short sequences, for which a GPU does little more than read and write: each row is read where it lies, in
views of any strides, and what belongs together is one program's. Imported only where there is a GPU for it.

The rows [T] fall into ranges. The first has P rows that precede those of every other range: position j of a sequence is
row j below P, and its own row j - P from there on. Queries and keys are both counted in positions, in blocks of N. So
query block i sees key blocks 0 to i, and only in block i some keys come after some queries. That one is computed first;
where a sequence fits in a block, it is the only one.

S ranges, H heads of queries, G of keys and values, d dimensions, D of them with padding.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)  # powers of two are quicker than those of e
# The quickest on an H100: forward and backward take 39 and 107 us at S1/64; reading and writing once would, 34 and 67.
WARPS, STAGES = 4, 1


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, shared: int, longest: int, scaling: float
) -> torch.Tensor:
    """Causal attention of q [T,H,d] to k and v [T,G,d] within each range and to the shared rows: [T,H,d].

    16 bit, d up to 256; strides may be any but in the last dimension. starts [S+1] int32: where the ranges begin, and T
    at the end. The first has the `shared` rows; each may be empty. longest: no range, with the shared rows, has more.
    Sums are in float32, and always taken in the same order. The gradients of the shared rows are those of all ranges.
    """
    return _attention(q, k, v, starts, shared, longest, scaling)[0]


def block_size(dimensions: int, memory: int) -> int:
    """Positions of a block. memory: bytes of the GPU's shared memory that a program may have."""
    block = 64 if dimensions <= 128 else 32
    # Seven blocks in 16 bit are the most that either kernel wants.
    return block if 14 * block * dimensions <= memory else block // 2


@torch.library.custom_op("minigpt4::packed_attention", mutates_args=())
def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, shared: int, longest: int, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output [T,H,d], and for the backward pass log2 of the softmax's denominators [H,T] float32."""
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    _launch("forward", q.shape[1], q, k, v, (out, lse, starts), shared, longest, scaling)
    return out, lse


@torch.library.custom_op("minigpt4::packed_attention_backward", mutates_args=())
def _attention_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    starts: torch.Tensor, shared: int, longest: int, scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous."""
    rows, ranges = len(q), len(starts) - 1
    dq, dk, dv = q.new_empty(q.shape), *(x.new_empty(rows + ranges * shared, *x.shape[1:]) for x in (k, v))
    others = (out, lse, grad.contiguous(), dq, dk, dv, starts)
    _launch("backward", k.shape[1], q, k, v, others, shared, longest, scaling)
    if shared:  # atomic operations would add in any order
        for x in (dk, dv):
            torch.sum(x[rows:].unflatten(0, (ranges, shared)), 0, out=x[:shared])
    return dq, dk[:rows], dv[:rows]


def _launch(kernel: str, programs: int, q, k, v, others: tuple, shared: int, longest: int, scaling: float) -> None:
    """Start the programs of each block of each range. others: further tensors, `starts` the last."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    (rows, heads, d), group = q.shape, q.shape[1] // k.shape[1]
    padded = max(16, triton.next_power_of_2(d))  # what Triton's products take
    memory = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin if q.is_cuda else 2**20
    strides = [stride for x in (q, k, v) for stride in x.stride()[:2]]
    block, launch = block_size(padded, memory), _forward if kernel == "forward" else _backward
    # The backward pass of a group holds the gradients of keys and values while it goes through its heads.
    warps = 2 * WARPS if kernel == "backward" and group > 1 else WARPS
    with torch.cuda.device_of(q):
        launch[programs, len(others[-1]) - 1, triton.cdiv(longest, block)](
            q, k, v, *others, *strides, shared, rows, scaling, heads, group, d, padded, block,
            num_warps=warps, num_stages=STAGES,
        )  # fmt: skip


@_attention.register_fake
def _(q, k, v, starts, shared, longest, scaling):
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@_attention_backward.register_fake
def _(grad, q, k, v, out, lse, starts, shared, longest, scaling):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx, inputs, output) -> None:
    *tensors, ctx.shared, ctx.longest, ctx.scaling = inputs
    ctx.save_for_backward(*tensors[:3], *output, tensors[3])
    ctx.set_materialize_grads(False)  # none for the denominators


def _gradients(ctx, grad, _):
    return *_attention_backward(grad, *ctx.saved_tensors, ctx.shared, ctx.longest, ctx.scaling), *[None] * 4


_attention.register_autograd(_gradients, setup_context=_keep)


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
    q, k, v, out, lse, starts, q_row, q_head, k_row, k_head, v_row, v_head, shared, T, scaling,
    H: tl.constexpr, GROUP: tl.constexpr, d: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One head's outputs of one block of queries."""
    head, block = tl.program_id(0), tl.program_id(2)
    start, before, keys = _sequence(starts, shared)
    if block * N >= keys or (block + 1) * N <= before:
        return
    q, k, v = q + head * q_head, k + head // GROUP * k_head, v + head // GROUP * v_head
    positions, rows = _block(block, start, before, N)
    own = (positions >= before) & (positions < keys)
    queries = _load(q, rows, q_row, own, d, D)
    key = _load(k, rows, k_row, positions < keys, d, D)
    value = _load(v, rows, v_row, positions < keys, d, D)
    scale = scaling * LOG2_E
    scores = tl.dot(queries, tl.trans(key)) * scale
    scores = tl.where(positions[:, None] >= positions[None, :], scores, float("-inf"))
    highest = tl.max(scores, 1)
    weights = tl.exp2(scores - highest[:, None])
    total = tl.sum(weights, 1)
    output = tl.dot(weights.to(value.dtype), value)
    for earlier in range(0, block):
        others, other_rows = _block(earlier, start, before, N)
        key = _load(k, other_rows, k_row, others < keys, d, D)
        value = _load(v, other_rows, v_row, others < keys, d, D)
        scores = tl.dot(queries, tl.trans(key)) * scale
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
def _load_queries(q, out, lse, grad, rows, q_row, o_row, own, d: tl.constexpr, D: tl.constexpr):
    """Queries and gradients [N,D] of a block, log2 of the denominators and output · gradient [N]."""
    queries, gradient = _load(q, rows, q_row, own, d, D), _load(grad, rows, o_row, own, d, D)
    output, denominators = _load(out, rows, o_row, own, d, D), tl.load(lse + rows, mask=own, other=float("inf"))
    return queries, gradient, denominators, tl.sum(output.to(tl.float32) * gradient.to(tl.float32), 1)


@triton.jit
def _weights(key, value, queries, gradient, lse, delta, scale, seen):
    """The weights [keys,queries] and the gradients of the scores, in 16 bit: transposed, as dk and dv want them."""
    weights = tl.exp2(tl.dot(key, tl.trans(queries)) * scale - lse[None, :])
    weights = tl.where(seen, weights, 0.0)
    score_gradient = weights * (tl.dot(value, tl.trans(gradient)) - delta[None, :])
    return weights.to(key.dtype), score_gradient.to(key.dtype)


@triton.jit(do_not_specialize=["shared", "T"])
def _backward(
    q, k, v, out, lse, grad, dq, dk, dv, starts, q_row, q_head, k_row, k_head, v_row, v_head, shared, T, scaling,
    H: tl.constexpr, GROUP: tl.constexpr, d: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of positions: of the queries of each head in a group, and of the group's keys and values.

    What block i's queries and keys have to do with each other goes into both; then come the queries with earlier keys,
    then the keys with later queries. So each block has as much to do as the others of its sequence.
    """
    group, block = tl.program_id(0), tl.program_id(2)
    start, before, keys = _sequence(starts, shared)
    if block * N >= keys:
        return
    blocks = tl.cdiv(keys, N)
    k, v = k + group * k_head, v + group * v_head
    o_row, scale = H * d, scaling * LOG2_E
    positions, rows = _block(block, start, before, N)
    present = positions < keys
    own = present & (positions >= before)
    key, value = _load(k, rows, k_row, present, d, D), _load(v, rows, v_row, present, d, D)
    key_gradient, value_gradient = tl.zeros([N, D], tl.float32), tl.zeros([N, D], tl.float32)
    for member in range(GROUP):
        head = group * GROUP + member
        o, q_of_head, lse_of_head = head * d, q + head * q_head, lse + head * T
        queries, gradient, denominators, delta = _load_queries(
            q_of_head, out + o, lse_of_head, grad + o, rows, q_row, o_row, own, d, D
        )
        seen = positions[:, None] <= positions[None, :]
        weights, score_gradient = _weights(key, value, queries, gradient, denominators, delta, scale, seen)
        query_gradient = tl.dot(tl.trans(score_gradient), key)
        for earlier in range(0, block):
            others, other_rows = _block(earlier, start, before, N)
            other_key = _load(k, other_rows, k_row, others < keys, d, D)
            other_value = _load(v, other_rows, v_row, others < keys, d, D)
            _, other = _weights(other_key, other_value, queries, gradient, denominators, delta, scale, True)
            query_gradient = tl.dot(tl.trans(other), other_key, query_gradient)
        _store(dq + o, (query_gradient * scaling).to(key.dtype), rows, o_row, own, d, D)
        value_gradient = tl.dot(weights, gradient, value_gradient)
        key_gradient = tl.dot(score_gradient, queries, key_gradient)
        for later in range(block + 1, blocks):
            others, other_rows = _block(later, start, before, N)
            queries, gradient, denominators, delta = _load_queries(
                q_of_head, out + o, lse_of_head, grad + o, other_rows, q_row, o_row,
                (others >= before) & (others < keys), d, D,
            )  # fmt: skip
            weights, score_gradient = _weights(key, value, queries, gradient, denominators, delta, scale, True)
            value_gradient = tl.dot(weights, gradient, value_gradient)
            key_gradient = tl.dot(score_gradient, queries, key_gradient)
    # Of shared rows each range has a gradient of its own, behind those of all rows.
    first = T + tl.program_id(1).to(tl.int64) * shared
    rows, kv_row = tl.where(positions < shared, first + positions, rows), H // GROUP * d
    _store(dv + group * d, value_gradient.to(key.dtype), rows, kv_row, present, d, D)
    _store(dk + group * d, (key_gradient * scaling).to(key.dtype), rows, kv_row, present, d, D)
