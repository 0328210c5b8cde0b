"""The kernels of a vision encoder's blocks, run by Triton's interpreter on the CPU."""

import importlib.util

import pytest
from helpers import interpret

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (Linux)")


@pytest.mark.parametrize("name", ["layer norm", "layer norm in fp8"])
def test_add_layer_norm(name):
    """In float32, compared with float64, for widths that are powers of two and others. Memory is NaN before."""
    assert all(max(errors) < 1e-6 for errors in interpret("fp8_cases.py")[name])


def test_vit_attention():
    assert max(interpret("fp8_cases.py")["attention"]) < 1e-6
