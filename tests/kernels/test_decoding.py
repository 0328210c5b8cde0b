"""The kernels of decoding, interpreted by Triton on the CPU."""

import importlib.util

import pytest
from decoding_cases import ATTENTIONS, PRODUCTS, TYPES
from helpers import interpret

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (Linux)")
# Of float32 sums, and of rounding the result to 16 bit.
BOUNDS = {"float32": 2e-6, "bfloat16": 8e-3, "float16": 1e-3}


@pytest.fixture(scope="module")
def interpreted():
    return interpret("decoding_cases.py")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", [*PRODUCTS, *ATTENTIONS])
def test_results(interpreted, name, dtype):
    """Against float64. Every element of the result is written: memory is NaN before."""
    assert interpreted["errors"][f"{name}, {dtype}"] < BOUNDS[dtype]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_8_bit_weights(interpreted, name, dtype):
    assert interpreted["errors"][f"{name}, int8 and {dtype}"] < BOUNDS[dtype]


def test_shapes_that_do_not_belong_together_are_refused(interpreted):
    rows, heads, width = interpreted["refusals"]
    assert "keys [3, 9, 2, 8]" in rows and "G divides H" in heads and "keys [2, 9, 2, 16]" in width


def test_8_bit_weights_are_turned_back_as_by_torch(interpreted):
    assert interpreted["turned back otherwise"] == 0
