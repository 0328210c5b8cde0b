"""A batch's loss and gradient have the same bits in each process, whichever batch it compiles first.

In a resumed run another batch comes first.
"""

import os
import subprocess
import sys
from collections import defaultdict

import pytest
import same_kernels_cases
import torch
from same_kernels_cases import BATCHES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


FP8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="needs a GPU with fp8"
)


@pytest.mark.parametrize("kind", ["16bit", "4bit", "lora", pytest.param("fp8", marks=FP8)])
def test_the_first_batch_and_the_cache_have_no_influence(tmp_path, kind):
    names = list(BATCHES)
    found, processes = defaultdict(set), []
    for order in (names, names[::-1], names[1:] + names[:1], names):
        folder = tmp_path / str(len(processes))
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder), "TRITON_CACHE_DIR": str(folder / "triton")}
        env["PYTHONPATH"] = os.pathsep.join(sys.path)
        words = [sys.executable, same_kernels_cases.__file__, kind, *order]
        processes.append(subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True))
    for process in processes:
        out, _ = process.communicate()
        assert process.returncode == 0
        for line in out.splitlines():
            name, _, bits = line.partition(": ")
            found[name].add(bits)
    assert {name: len(bits) for name, bits in found.items()} == dict.fromkeys(names, 1)
