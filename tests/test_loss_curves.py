"""tests/loss_curves.py on a small model and few steps: one rank against two."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers import PYTHONPATH, ROOT
from loss_curves import compare, main


def compare_two_ranks(config, tmp_path, tolerance, *options):
    """One rank, one rank with reversed samples, and two ranks started by torchrun."""
    common = ["--cfg-path", str(config), "--batch", "6", "--steps", "12"]
    common += ["--options", *options] if options else []
    one = tmp_path / "one.json"
    assert main([*common, "--out", str(one)]) == 0
    curve = json.loads(one.read_text())
    assert len(curve) == 12 and curve[-1] < curve[0] - 0.5
    common += ["--against", str(one), "--tolerance", tolerance]
    assert main([*common, "--reverse"]) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": PYTHONPATH,
    }
    done = subprocess.run(
        [*command, "tests/loss_curves.py", *common], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 × 3: loss" in done.stdout and done.stdout.count("largest difference") == 1


@pytest.mark.slow
def test_two_ranks_learn_as_one(configs, tmp_path):
    """The ranks' means, averaged, would be off by 9e-3 here."""
    compare_two_ranks(configs["stage1"], tmp_path, "1e-4")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_two_ranks_share_a_gpu(configs, tmp_path):
    """Gradients are exchanged while layers are compiled and graphs replayed; in 16 bit, so less exactly."""
    compare_two_ranks(configs["stage1"], tmp_path, "0.1", "run.device=cuda:0", "run.dist_backend=gloo")


@pytest.mark.parametrize("loss", [1.2, float("nan")])
def test_curves_that_differ(loss, capsys):
    assert compare([2.0, loss], [2.0, 1.0], tolerance=0.1) == 1
    assert compare([2.0, 1.05], [2.0, 1.0], tolerance=0.1) == 0


def test_what_cannot_be_compared(configs):
    with pytest.raises(SystemExit, match="without model.prompt_path"):
        main(["--cfg-path", str(configs["stage2"]), "--options", "model.ckpt=null"])
