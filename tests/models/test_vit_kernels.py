"""Sum and norm in one pass, interpreted by Triton on the CPU."""

import importlib.util

import pytest
from helpers import interpret

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (Linux)")


def test_sum_norm():
    """In float32, against float64, of widths that are powers of two and not. Memory is NaN before."""
    results = interpret("fp8_cases.py")
    assert all(max(errors) < 1e-6 for errors in results["sum_norm"])
    assert all(max(errors) < 1e-6 for errors in results["rounded_sum_norm"])
