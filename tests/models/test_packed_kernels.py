"""The kernels of a training step, interpreted on the CPU: in a process of its own, since that is set at the import."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT
from kernel_cases import CASES, LAYER_STEPS

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (Linux)")


@pytest.fixture(scope="module")
def interpreted():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "tests/kernel_cases.py"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
    )
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stderr:
        pytest.skip("this Triton's interpreter does not go with this NumPy (3.6 and 2.4 do not)")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [*CASES, *LAYER_STEPS, "compiled"])
def test_output_and_gradients(interpreted, name):
    """In float32, against float64. Every element of output and gradients is written: memory is NaN before."""
    assert max(interpreted[name]) < 2e-6


def test_in_16_bit(interpreted):
    assert 1e-5 < max(interpreted["float16"]) < 2e-3


def test_blocks_fit_into_shared_memory():
    from minigpt4.models.packed_kernels import block_size

    hopper, ada = 227 * 1024, 99 * 1024
    assert [block_size(d, hopper) for d in (64, 128, 256)] == [64, 64, 32]
    assert [block_size(d, ada) for d in (64, 128, 256)] == [64, 32, 16]
