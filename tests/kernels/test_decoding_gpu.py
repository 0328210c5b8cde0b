"""The kernels of decoding on a GPU, one by one and in a graph. Skipped, and said so, without one."""

import pytest
import torch
from decoding_cases import (
    ATTENTIONS,
    PRODUCTS,
    TURNED,
    TYPES,
    attention_error,
    error,
    product_error,
    turned_back_differs,
)

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
        reason="needs a GPU of compute capability 8.0 (Ampere)",
    ),
    pytest.mark.usefixtures("poisoned_memory"),
]
DTYPES = pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
LLAMA = {"q": (4096, 4096, 0), "up": (11008, 4096, 0), "down": (4096, 11008, 0), "output": (32000, 4096, 0)}
# Rows that see so many slots each, of so many; 32 heads of 128.
CACHES = {"an answer": ([300], 384), "a full context": ([4096], 4096), "a batch": ([*range(100, 292, 3)], 384)}


@pytest.fixture
def kernels():
    from minigpt4.kernels import decoding as decoding_kernels

    return decoding_kernels


@DTYPES
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("name", [*PRODUCTS, *LLAMA])
def test_products(kernels, monkeypatch, name, int8, dtype):
    monkeypatch.setattr("decoding_cases.PRODUCTS", PRODUCTS | LLAMA)
    assert product_error(kernels.row_product, name, dtype, "cuda", int8) < BOUNDS[dtype]


@DTYPES
@pytest.mark.parametrize("name", [*TURNED, *LLAMA])
def test_8_bit_weights_are_turned_back_as_by_torch(monkeypatch, name, dtype):
    from minigpt4.kernels.int8 import turned_back

    monkeypatch.setattr("decoding_cases.TURNED", TURNED | LLAMA)
    assert turned_back_differs(turned_back, name, dtype, "cuda") == 0


@DTYPES
@pytest.mark.parametrize("name", [*ATTENTIONS, *CACHES])
def test_attention(kernels, monkeypatch, name, dtype):
    caches = {cache: (*sizes, 32, 32, 128) for cache, sizes in CACHES.items()}
    monkeypatch.setattr("decoding_cases.ATTENTIONS", ATTENTIONS | caches)
    assert attention_error(kernels.attend_slots, name, dtype, "cuda") < BOUNDS[dtype]


def test_each_kernel_waits_for_the_one_before(kernels):
    """In a graph, where products begin while others, attention, or other kernels still compute what they need."""
    width, heads, slots = 1024, 8, 700
    weights = [torch.randn(width, width, device="cuda") * width**-0.5 for _ in range(6)]
    keys, values = torch.randn(2, 1, slots, heads, width // heads, device="cuda")
    x, seen = torch.zeros(1, width, device="cuda"), torch.zeros(1, dtype=torch.long, device="cuda")

    def chain(product, attend, x):
        for weight in weights:
            x = product(product(x, weight), weight) + x
            x = product(attend(x.view(1, heads, -1)).reshape(1, width), weight) + x
            x = x / x.norm() * width**0.5
        return x

    def attend(query):
        return kernels.attend_slots(query, keys, values, seen, 0.1)

    def exact(query):
        scores = torch.einsum("bhd,blhd->bhl", query, keys[:, : int(seen)].double()) * 0.1
        return torch.einsum("bhl,blhd->bhd", scores.softmax(-1), values[:, : int(seen)].double())

    seen.fill_(1)
    chain(kernels.row_product, attend, x)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(kernels.row_product, attend, x)
    for length in (1, 700, 64, 300) * 5:
        x.normal_()
        seen.fill_(length)
        graph.replay()
        truth = chain(lambda x, weight: x @ weight.double().t(), exact, x.double())
        assert error(y, truth) < 1e-4
