"""The kernels of a training step on a GPU: 16 bit, compiled, recorded in a graph. Skipped, and said so, without one."""

import pytest
import torch
from training_cases import (
    CASES,
    SILU_PRODUCTS,
    case_errors,
    errors,
    inputs,
    lengths_to_starts,
    reference,
    rotated_case_errors,
    silu_product_errors,
)

from minigpt4.fast.attention import Segments, packed_attention

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="needs a GPU of compute capability 8.0 (Ampere)",
    ),
    pytest.mark.usefixtures("poisoned_memory"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
# Of Llama-7B's heads; sequences of stage 1, of stage 2, of next to nothing and of a full context.
LENGTHS = {1: [*range(40, 57)] * 2, 8: [115, 195, 160, 188, 131, 20], 0: [1, 0, 5, 0, 12, 0, 3, 0], 30: [2000, 5, 300]}


@pytest.fixture
def attention():
    from minigpt4.kernels.packed_attention import attention

    return attention


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients(attention, name, dtype):
    assert max(case_errors(attention, name, dtype, "cuda")) < 1e-2


@DTYPES
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_rotated_heads(name, int8, dtype):
    from minigpt4.fast.rope_attention import rotated_attention

    assert max(rotated_case_errors(rotated_attention, name, dtype, "cuda", int8)) < 2e-2  # heads are rounded, too


@DTYPES
@pytest.mark.parametrize("name", SILU_PRODUCTS)
def test_silu_product(name, dtype):
    assert max(silu_product_errors(name, dtype, "cuda")) < 1e-2


@DTYPES
@pytest.mark.parametrize("shared", LENGTHS)
def test_sizes_of_training(attention, shared, dtype):
    starts, longest = lengths_to_starts(LENGTHS[shared], shared, "cuda")
    tensors = inputs(int(starts[-1]), 8, 8, 128, dtype, "cuda")
    assert max(errors(attention, *tensors, 8, starts, shared, longest)) < 1e-2


def test_the_same_bits_each_time(attention):
    starts, longest = lengths_to_starts(LENGTHS[8], 8, "cuda")
    qkv, gradient = inputs(int(starts[-1]), 8, 2, 128, torch.bfloat16, "cuda")
    runs = []
    for _ in range(3):
        output = attention(qkv, 2, starts, 8, longest, 0.1)
        runs.append((output, *torch.autograd.grad(output, qkv, gradient)))
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@DTYPES
def test_compiled(dtype):
    """As a layer calls it: one compilation for all lengths."""

    def attend(query, key, value, segments):
        return packed_attention(query * 1.0, key, value, 0.1, segments) * 1.0

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True)
    for lengths, shared in ((LENGTHS[1], 1), (LENGTHS[8], 8), (LENGTHS[30], 30), (LENGTHS[0], 0)):
        starts, longest = lengths_to_starts(lengths, shared, "cuda")
        qkv, gradient = inputs(int(starts[-1]), 8, 2, 64, dtype, "cuda")
        heads_first = (x.transpose(0, 1).unsqueeze(0) for x in qkv.split([8, 2, 2], dim=1))
        output = compiled(*heads_first, Segments(starts, shared, longest))
        assert output.shape == (1, *gradient.shape)
        expected = reference(qkv, 2, starts, shared, longest, 0.1)
        results = output[0], *torch.autograd.grad(output, qkv, gradient.unsqueeze(0))
        truths = expected, *torch.autograd.grad(expected, qkv, gradient.double())
        assert all((a.double() - b).norm() < 1e-2 * b.norm() for a, b in zip(results, truths, strict=True))


@DTYPES
def test_replayed_with_other_lengths(attention, dtype):
    """One recording serves all batches of as many rows and ranges: the lengths are read on the GPU."""
    batches = [[40, 56, 48, 20], [64, 1, 99, 0], [0, 0, 0, 164], [41, 41, 41, 41]]
    starts, _ = lengths_to_starts(batches[0], 4, "cuda")
    qkv, gradient = inputs(int(starts[-1]), 4, 2, 128, dtype, "cuda")

    def run():
        output = attention(qkv, 2, starts, 4, 256, 0.1)
        return output, *torch.autograd.grad(output, qkv, gradient)

    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    for lengths in batches:
        starts.copy_(lengths_to_starts(lengths, 4, "cuda")[0])
        for x in (qkv, gradient):
            x.data.normal_()
        for result in results:
            result.fill_(torch.nan)
        graph.replay()
        expected = reference(qkv, 2, starts, 4, 256, 0.1)
        truths = expected, *torch.autograd.grad(expected, qkv, gradient.double())
        assert all((a.double() - b).norm() < 1e-2 * b.norm() for a, b in zip(results, truths, strict=True))
