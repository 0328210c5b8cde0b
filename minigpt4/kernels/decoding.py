"""What a decoding step does for each row by itself, as two Triton kernels: products of a single row, and attention.
(A product in 4 bit is bitsandbytes'.)

Both wait for memory alone, so each number is read once, in long pieces, many of them under way at a time. Imported only
where there is a GPU for it.

On a Hopper GPU or newer a product begins while the kernel before it still runs (programmatic dependent launch): it
loads its first weights, and waits before it takes what that kernel wrote. So weights must not be what the kernel just
before it writes.

K inputs, N outputs; B rows, H heads of queries, G of keys and values, L slots, d dimensions.
"""

import torch
import triton
import triton.language as tl

from minigpt4.quantization.bitsandbytes import BLOCK

LOG2_E = tl.constexpr(1.4426950408889634)  # powers of two are quicker than those of e
# The quickest on an H100: bytes of a weight's row that a program takes at a time, and its rows; half of them, with half
# the warps, where there are more inputs than LONG.
PIECE, ROWS, LONG = 4096, 4, 8192
# Attention: warps of a program, of which up to FEW should be wide, and more of them narrow. A thread loads so many
# numbers of keys, and as many of values, at a time.
WIDE, NARROW, FEW, PER_THREAD = 16, 8, 256, 32


@torch.library.custom_op("minigpt4::row_product", mutates_args=())
def row_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """A single row x [...,K] times weight [N,K], times scale [N] where given: [...,N] of x's type.

    Each row of the weight, which may be int8, is contiguous. Sums are in float32.
    """
    (outputs, inputs), x = weight.shape, x.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    piece = min(PIECE // weight.element_size(), triton.next_power_of_2(inputs))
    rows = ROWS // 2 if inputs > LONG else ROWS
    overlap = _overlaps(x)
    with torch.cuda.device_of(x):
        _product[(triton.cdiv(outputs, rows),)](
            x, weight, scale, y, weight.stride(0), outputs, inputs, rows, piece, overlap,
            num_warps=2 * rows, **({"launch_pdl": True} if overlap else {}),
        )  # fmt: skip
    return y


def row_product_4bit(
    x: torch.Tensor, weight: torch.Tensor, outputs: int, scale: torch.Tensor, code: torch.Tensor
) -> torch.Tensor:
    """A single row x [...,K] times a weight in 4 bit, as of `LowBitLinear`, with `outputs` (N) rows: [...,N]."""
    return torch.ops.bitsandbytes.gemv_4bit(x, weight, [outputs, x.shape[-1]], scale, code, BLOCK)


@torch.library.custom_op("minigpt4::attend_slots", mutates_args=())
def attend_slots(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, seen: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Attention of one query [B,H,d] a row to the first `seen` [B] of its slots, keys and values [B,L,G,d]: [B,H,d].

    G divides H. Strides may be any but in the last dimension. A row sees one slot at least. Sums are in float32.

    Raises ValueError for shapes that do not belong together.
    """
    (batch, heads, d), groups = query.shape, keys.shape[2]
    if keys.shape != values.shape or keys.shape[0] != batch or keys.shape[3] != d or heads % groups:
        raise ValueError(
            f"attend_slots: queries {list(query.shape)}, keys {list(keys.shape)} and values {list(values.shape)} do "
            "not belong together; they are [B,H,d] and twice [B,L,G,d], where G divides H."
        )
    query, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, keys, values))
    out = query.new_empty(batch, heads, d)
    strides = [*query.stride()[:2], *keys.stride()[:3], *values.stride()[:3]]
    padded, warps = triton.next_power_of_2(d), WIDE if batch * heads <= FEW else NARROW
    with torch.cuda.device_of(query):
        _attend[heads, batch](
            query, keys, values, seen, out, *strides, scaling, heads // groups, d, padded,
            max(1, 32 * warps * PER_THREAD // padded), _overlaps(query), num_warps=warps,
        )  # fmt: skip
    return out


def _overlaps(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (9, 0)


@row_product.register_fake
def _(x, weight, scale=None):
    return x.new_empty(*x.shape[:-1], len(weight))


@attend_slots.register_fake
def _(query, keys, values, seen, scaling):
    return query.new_empty(query.shape)


@triton.jit
def _product(
    x, w, scale, y, w_row, outputs, K: tl.constexpr, ROWS: tl.constexpr, PIECE: tl.constexpr, OVERLAP: tl.constexpr
):
    """ROWS outputs; the loop over K is unrolled, so that all loads are under way at once."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, PIECE)
    # The last program takes the last row several times, where another has none.
    w += tl.minimum(rows, outputs - 1)[:, None].to(tl.int64) * w_row + columns[None, :]
    if scale is not None:
        scales = tl.load(scale + rows, mask=rows < outputs, other=0)
    sums = tl.zeros([ROWS, PIECE], tl.float32)
    for k in tl.static_range(0, K, PIECE):
        if k + PIECE <= K:
            weights = tl.load(w + k, eviction_policy="evict_first")
        else:
            weights = tl.load(w + k, mask=(k + columns < K)[None, :], other=0, eviction_policy="evict_first")
        if OVERLAP and k == 0:
            tl.extra.cuda.gdc_wait()
        if k + PIECE <= K:
            inputs = tl.load(x + k + columns)
        else:
            inputs = tl.load(x + k + columns, mask=k + columns < K, other=0)
        sums += weights.to(tl.float32) * inputs.to(tl.float32)[None, :]
    products = tl.sum(sums, 1)
    if scale is not None:
        products *= scales.to(tl.float32)
    tl.store(y + rows, products.to(y.dtype.element_ty), mask=rows < outputs)


@triton.jit
def _attend(
    q, k, v, seen, out, q_row, q_head, k_row, k_slot, k_head, v_row, v_slot, v_head, scaling,
    GROUP: tl.constexpr, d: tl.constexpr, D: tl.constexpr, N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One head of one row. Each of N places goes through every N-th slot by itself; the end puts them together."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    count = tl.load(seen + row).to(tl.int32)
    dims = tl.arange(0, D)
    query = tl.load(q + row * q_row + head * q_head + dims, mask=dims < d, other=0).to(tl.float32)
    query *= scaling * LOG2_E
    k += row * k_row + head // GROUP * k_head + dims[None, :]
    v += row * v_row + head // GROUP * v_head + dims[None, :]
    highest = tl.full([N], -3e38, tl.float32)
    totals, sums = tl.zeros([N], tl.float32), tl.zeros([N, D], tl.float32)
    for first in range(0, count, N):
        slots = first + tl.arange(0, N)
        mask = (slots < count)[:, None] & (dims < d)[None, :]
        keys = tl.load(k + slots[:, None].to(tl.int64) * k_slot, mask=mask, other=0)
        values = tl.load(v + slots[:, None].to(tl.int64) * v_slot, mask=mask, other=0)
        scores = tl.sum(keys.to(tl.float32) * query[None, :], 1)
        scores = tl.where(slots < count, scores, float("-inf"))
        higher = tl.maximum(highest, scores)
        shrunk, weights = tl.exp2(highest - higher), tl.exp2(scores - higher)
        totals = totals * shrunk + weights
        sums = sums * shrunk[:, None] + weights[:, None] * values.to(tl.float32)
        highest = higher
    shrunk = tl.exp2(highest - tl.max(highest, 0))
    output = tl.sum(sums * shrunk[:, None], 0) / tl.sum(totals * shrunk, 0)
    out += (row * tl.num_programs(0) + head) * d
    tl.store(out + dims, output.to(out.dtype.element_ty), mask=dims < d)
