"""The kernels that quantize rows to fp8, run by Triton's interpreter on the CPU."""

import importlib.util

import pytest
from fp8_cases import QUANTIZE_CASES
from helpers import interpret

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (Linux)")


@pytest.fixture(scope="module")
def interpreted():
    return interpret("fp8_cases.py")


@pytest.mark.parametrize("name", QUANTIZE_CASES)
def test_values_and_scales(interpreted, name):
    """Memory is NaN before, so every element has to be written."""
    assert max(interpreted[name]) < (1e-3 if name == "gelu" else 1e-6)


def test_one_compilation_for_all_lengths(interpreted):
    assert interpreted["compilations"] == [1] * 5


def test_rows_of_zeros_and_rows_that_are_not_finite(interpreted):
    assert interpreted["finite rows"] == [True, True, False, False, True]
