"""The kernels of a training step on a GPU: 16 bit, compiled, in a CUDA graph. Skipped without one, with the reason."""

import pytest
import torch
import training_cases
from training_cases import (
    ATTENTION_CASES,
    SILU_PRODUCT_CASES,
    case_errors,
    errors,
    inputs,
    lengths_to_starts,
    reference,
    relative_errors,
    rope_case_errors,
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
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
# Lengths of sequences by the length of their prefix: of stage 1, of stage 2, almost empty ones, and a full context.
LENGTHS = {1: [*range(40, 57)] * 2, 8: [115, 195, 160, 188, 131, 20], 0: [1, 0, 5, 0, 12, 0, 3, 0], 30: [2000, 5, 300]}


@pytest.fixture
def attention():
    return training_cases.packed_attention


@EACH_DTYPE
@pytest.mark.parametrize("name", ATTENTION_CASES)
def test_output_and_gradients(attention, name, dtype):
    assert max(case_errors(attention, name, dtype, "cuda")) < 1e-2


@EACH_DTYPE
@pytest.mark.parametrize("other", [{}, {"int8": True}, {"adapter": True}], ids=str)
@pytest.mark.parametrize("name", ATTENTION_CASES)
def test_rotated_heads(name, other, dtype):
    from minigpt4.fast.rope_attention import rope_attention

    assert max(rope_case_errors(rope_attention, name, dtype, "cuda", **other)) < 2e-2  # heads are rounded, too


@EACH_DTYPE
@pytest.mark.parametrize("name", SILU_PRODUCT_CASES)
def test_silu_product(name, dtype):
    assert max(silu_product_errors(name, dtype, "cuda")) < 1e-2


@EACH_DTYPE
@pytest.mark.parametrize("prefix_len", LENGTHS)
def test_lengths_of_training(attention, prefix_len, dtype):
    starts, max_kv_len = lengths_to_starts(LENGTHS[prefix_len], prefix_len, "cuda")
    tensors = inputs(int(starts[-1]), 8, 8, 128, dtype, "cuda")
    assert max(errors(attention, *tensors, 8, starts, prefix_len, max_kv_len)) < 1e-2


def test_the_same_bits_each_time(attention):
    starts, max_kv_len = lengths_to_starts(LENGTHS[8], 8, "cuda")
    qkv, gradient = inputs(int(starts[-1]), 8, 2, 128, torch.bfloat16, "cuda")
    runs = []
    for _ in range(3):
        output = attention(qkv, 2, starts, 8, max_kv_len, 0.1)
        runs.append((output, *torch.autograd.grad(output, qkv, gradient)))
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@EACH_DTYPE
def test_compiled(dtype):
    """As a layer calls it; `segments` differ from call to call."""

    def attend(query, key, value, segments):
        return packed_attention(query * 1.0, key, value, 0.1, segments) * 1.0

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True)
    for prefix_len in (1, 8, 30, 0):
        starts, max_kv_len = lengths_to_starts(LENGTHS[prefix_len], prefix_len, "cuda")
        qkv, gradient = inputs(int(starts[-1]), 8, 2, 64, dtype, "cuda")
        heads_first = (x.transpose(0, 1).unsqueeze(0) for x in qkv.split([8, 2, 2], dim=1))
        output = compiled(*heads_first, Segments(starts, prefix_len, max_kv_len))
        assert output.shape == (1, *gradient.shape)
        expected = reference(qkv, 2, starts, prefix_len, max_kv_len, 0.1)
        results = output[0], *torch.autograd.grad(output, qkv, gradient.unsqueeze(0))
        truths = expected, *torch.autograd.grad(expected, qkv, gradient.double())
        assert max(relative_errors(results, truths)) < 1e-2


@EACH_DTYPE
def test_replayed_with_other_lengths(attention, dtype):
    """One CUDA graph serves all batches of as many tokens and sequences: it reads the lengths on the GPU."""
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
        assert max(relative_errors(results, truths)) < 1e-2
