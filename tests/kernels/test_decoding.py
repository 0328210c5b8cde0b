"""The decoding kernels, run by Triton's interpreter on the CPU."""

import importlib.util

import pytest
from decoding_cases import ATTENTION_CASES, LINEAR_CASES, dtypes_of
from helpers import interpret

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (Linux)")
# From float32 sums, and from rounding the result to 16 bit.
BOUNDS = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}


@pytest.fixture(scope="module")
def interpreted():
    return interpret("decoding_cases.py")


@pytest.mark.parametrize(("name", "dtype"), dtypes_of(LINEAR_CASES | ATTENTION_CASES))
def test_results(interpreted, name, dtype):
    """Compared with float64. Memory is NaN before, so every element of the result has to be written."""
    assert interpreted["errors"][f"{name}, {dtype}"] < BOUNDS[dtype]


@pytest.mark.parametrize(("name", "dtype"), dtypes_of(LINEAR_CASES))
def test_linear_with_8_bit_weights(interpreted, name, dtype):
    assert interpreted["errors"][f"{name}, int8 and {dtype}"] < BOUNDS[dtype]


def test_shapes_that_do_not_fit_together_raise(interpreted):
    wrong_batch, wrong_heads, wrong_dim = interpreted["error messages"]
    assert "[3, 9, 2, 8]" in wrong_batch and "[2, 9, 3, 8]" in wrong_heads and "[2, 9, 2, 16]" in wrong_dim


def test_dequantized_8_bit_weights_equal_torch(interpreted):
    assert interpreted["dequantize differences"] == 0
