"""The attention kernels, interpreted by Triton on the CPU: in a process of its own, since that is set at its import."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from attention_cases import CASES
from helpers import ROOT

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton (Linux)")


@pytest.fixture(scope="module")
def interpreted():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "tests/attention_cases.py"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
    )
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stderr:
        pytest.skip("this Triton's interpreter does not go with this NumPy (3.6 and 2.4 do not)")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", [*CASES, "compiled"])
def test_output_and_gradients(interpreted, name):
    """In float32, against float64. Every element of output and gradients is written: memory is NaN before."""
    assert max(interpreted[name]) < 2e-6


def test_in_16_bit(interpreted):
    assert 1e-5 < max(interpreted["float16"]) < 2e-3


def test_blocks_by_shared_memory_and_length():
    from minigpt4.models.packed_kernels import launches

    def blocks(*given):
        return [(constants["SCOPE"], constants["N"]) for constants in launches("backward", *given)]

    hopper, ada = 227 * 1024, 99 * 1024
    assert blocks(64, 128, 1, hopper) == [("short", 64)]
    assert blocks(128, 128, 1, hopper) == [("short", 64), ("long", 64)]
    assert blocks(256, 128, 1, hopper) == [("all", 64)]
    assert blocks(128, 128, 1, ada) == [("all", 32)]
    assert blocks(128, 64, 1, ada) == [("short", 64), ("long", 64)]
    assert [blocks(512, 256, 1, memory) for memory in (hopper, ada)] == [[("all", 32)], [("all", 16)]]
