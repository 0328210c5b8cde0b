"""The kernels of an encoder's blocks, interpreted by Triton on the CPU."""

import importlib.util

import pytest
from helpers import interpret

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (Linux)")


@pytest.mark.parametrize("name", ["sum_norm", "sum_norm in fp8"])
def test_sum_norm(name):
    """In float32, against float64, of widths that are powers of two and not. Memory is NaN before."""
    assert all(max(errors) < 1e-6 for errors in interpret("fp8_cases.py")[name])


def test_attention():
    assert max(interpret("fp8_cases.py")["attention"]) < 1e-6
