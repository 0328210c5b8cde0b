"""torch.compile chooses the same kernels for a decoder layer, whichever length is compiled first.

What they compute on a GPU is compared in test_same_kernels_gpu.py.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

import chosen_kernels_cases


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp8", "lora"])
def test_the_first_length_has_no_influence(kind):
    """torch.compile chooses by whether there are more than 512 tokens. In plain 16 bit it makes no difference."""
    words = [sys.executable, chosen_kernels_cases.__file__, kind, "300", "1500"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(words, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    short, long = map(json.loads, result.stdout.splitlines())
    assert short == long
    assert not short["compiled again"]
    sums = [kernel for kernel in short["kernels"] if kernel.startswith("triton_red")]
    assert len(sums) >= 4  # of two norms, forward and backward
