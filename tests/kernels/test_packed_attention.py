"""The kernels of a training step, run by Triton's interpreter on the CPU."""

import importlib.util

import pytest
from helpers import interpret
from training_cases import ADAPTED, ATTENTION_CASES, ROPE_CASES, SILU_PRODUCT_CASES

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (Linux)")


@pytest.fixture(scope="module")
def interpreted():
    return interpret("training_cases.py")


@pytest.mark.parametrize(
    "name",
    [
        *ATTENTION_CASES,
        "compiled",
        *(f"rotated, {case}" for case in [*ROPE_CASES, "8 bit", "compiled", "with an adapter"]),
        *SILU_PRODUCT_CASES,
    ],
)
def test_output_and_gradients(interpreted, name):
    """In float32, compared with float64. Memory is NaN before, so every element has to be written."""
    assert max(interpreted[name]) < 2e-6


@pytest.mark.parametrize("name", ["", ", 8 bit", *(f", adapters: {name}" for name in ADAPTED)])
def test_a_fused_llama_equals_transformers(interpreted, name):
    assert max(interpreted[f"fused llama{name}"]) < 1e-5


def test_in_16_bit(interpreted):
    assert 1e-5 < max(interpreted["float16"]) < 2e-3


def test_blocks_fit_into_shared_memory():
    from minigpt4.kernels.packed_attention import block_size

    hopper, ada = 227 * 1024, 99 * 1024
    assert [block_size(d, hopper) for d in (64, 128, 256)] == [64, 64, 32]
    assert [block_size(d, ada) for d in (64, 128, 256)] == [64, 32, 16]
