"""The decoding kernels on a GPU, one by one and in a CUDA graph. Skipped without a GPU, with the reason."""

import pytest
import torch
from decoding_cases import (
    ATTENTION_CASES,
    DEQUANTIZE_CASES,
    DTYPES,
    LINEAR_CASES,
    attention_error,
    dequantize_differences,
    linear_error,
    relative_error,
)

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="needs a GPU of compute capability 8.0 (Ampere)",
    ),
    pytest.mark.usefixtures("poisoned_memory"),
]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
LLAMA = {"q": (4096, 4096, 0), "up": (11008, 4096, 0), "down": (4096, 11008, 0), "output": (32000, 4096, 0)}
# kv_len of each sequence, and cache positions; 32 heads of 128.
CACHES = {"an answer": ([300], 384), "a full context": ([4096], 4096), "a batch": ([*range(100, 292, 3)], 384)}


@pytest.fixture
def kernels():
    from minigpt4.kernels import decoding as decoding_kernels

    return decoding_kernels


@EACH_DTYPE
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", [*LINEAR_CASES, *LLAMA])
def test_single_row_linear(kernels, monkeypatch, name, int8, dtype):
    monkeypatch.setattr("decoding_cases.LINEAR_CASES", LINEAR_CASES | LLAMA)
    assert linear_error(kernels.single_row_linear, name, dtype, "cuda", int8) < BOUNDS[dtype]


@EACH_DTYPE
@pytest.mark.parametrize("name", [*DEQUANTIZE_CASES, *LLAMA])
def test_dequantized_8_bit_weights_equal_torch(monkeypatch, name, dtype):
    from minigpt4.kernels.int8 import dequantize_int8

    monkeypatch.setattr("decoding_cases.DEQUANTIZE_CASES", DEQUANTIZE_CASES | LLAMA)
    assert dequantize_differences(dequantize_int8, name, dtype, "cuda") == 0


@EACH_DTYPE
@pytest.mark.parametrize("name", [*ATTENTION_CASES, *CACHES])
def test_attention(kernels, monkeypatch, name, dtype):
    caches = {cache: (*sizes, 32, 32, 128) for cache, sizes in CACHES.items()}
    monkeypatch.setattr("decoding_cases.ATTENTION_CASES", ATTENTION_CASES | caches)
    assert attention_error(kernels.attend_cache, name, dtype, "cuda") < BOUNDS[dtype]


def test_each_kernel_waits_for_the_one_before(kernels):
    """In a CUDA graph, where a linear kernel starts while other kernels still compute its input."""
    width, num_heads, positions = 1024, 8, 700
    weights = [torch.randn(width, width, device="cuda") * width**-0.5 for _ in range(6)]
    keys, values = torch.randn(2, 1, positions, num_heads, width // num_heads, device="cuda")
    x, kv_len = torch.zeros(1, width, device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda")

    def chain(linear, attend, x):
        for weight in weights:
            x = linear(linear(x, weight), weight) + x
            x = linear(attend(x.view(1, num_heads, -1)).reshape(1, width), weight) + x
            x = x / x.norm() * width**0.5
        return x

    def attend(query):
        return kernels.attend_cache(query, keys, values, kv_len, 0.1)

    def reference_attend(query):
        scores = torch.einsum("bhd,blhd->bhl", query, keys[:, : int(kv_len)].double()) * 0.1
        return torch.einsum("bhl,blhd->bhd", scores.softmax(-1), values[:, : int(kv_len)].double())

    def reference_linear(x, weight):
        return x @ weight.double().t()

    kv_len.fill_(1)
    chain(kernels.single_row_linear, attend, x)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(kernels.single_row_linear, attend, x)
    for length in (1, 700, 64, 300) * 5:
        x.normal_()
        kv_len.fill_(length)
        graph.replay()
        assert relative_error(y, chain(reference_linear, reference_attend, x.double())) < 1e-4
