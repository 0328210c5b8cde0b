"""What `doctor --probe` says of an estimate that was far off, and of a step that fails."""

from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from minigpt4.benchmarks import probe as probing
from minigpt4.common.config import Config
from minigpt4.doctor.check_memory import WORKSPACE, Memory
from minigpt4.doctor.run_context import RunContext


@pytest.mark.parametrize(
    ("estimated", "reserved", "warned"),
    [
        (20e9, 24e9, None),
        (20e9, 26e9, "the estimate was 20.0 GB, 1.30 times that was reserved"),
        (20e9, 15e9, "the estimate was 20.0 GB, 0.75 times that was reserved"),
        # a small model, where a large share is little memory
        (0.3e9, 0.7e9, None),
        (0.3e9, 0.9e9, "the estimate was 0.3 GB, 3.00 times that was reserved"),
        (0.6e9, 0.2e9, None),
    ],
)
def test_probe_warns_of_an_estimate_that_was_far_off(monkeypatch, estimated, reserved, warned):
    monkeypatch.setattr(probing, "estimate", lambda context: Memory(estimated - WORKSPACE, 0, 0))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: reserved)
    measured, *warnings = probing._measured(None, "a step took 1 s", torch.device("cuda"))
    assert measured.what.startswith("a step took 1 s, ") and measured.what.endswith("GPU memory reserved at most")
    assert [f.what for f in warnings] == ([warned] if warned else [])
    (measured,) = probing._measured(None, "a step took 1 s", torch.device("cpu"))
    assert measured.what == "a step took 1 s"


@pytest.mark.parametrize(
    ("problem", "what", "fix"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory", "batch_size_train=6"),
        (RuntimeError("no kernel image"), "RuntimeError: no kernel image", ""),
    ],
)
def test_probe_that_fails(monkeypatch, problem, what, fix):
    def fail(context):
        raise problem

    monkeypatch.setattr(probing, "_train", fail)
    cfg = Config(SimpleNamespace(cfg_path=ROOT / "train_configs/minigpt4_tiny_stage2_finetune.yaml", options=None))
    (found,) = probing.probe(RunContext(cfg))
    assert found.status == "error" and what in found.what and fix in found.fix
