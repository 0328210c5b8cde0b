"""bench train under torchrun: its steps, and the summary of their times."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from minigpt4.__main__ import main
from minigpt4.benchmarks.scaling import ScalingTimer
from minigpt4.benchmarks.synthetic import random_batches
from minigpt4.common import dist_utils

SMALL = """
import sys
from minigpt4.__main__ import main
from minigpt4.benchmarks import synthetic, train

synthetic.WORKLOADS["S1/16"], train.PROFILED_STEPS = (1, 2), 1
sys.exit(main())
"""


def torchrun(folder, *arguments) -> subprocess.CompletedProcess:
    """`bench train` by two processes, with batches of two."""
    script = folder / "small.py"
    script.write_text(SMALL)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, "bench", "train", *arguments], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_two_ranks_make_one_report(tmp_path):
    """On the CPU, since each rank would need a GPU of its own."""
    options = ("--options", "run.device=cpu")
    done = torchrun(tmp_path, "--small", "--work", "S1/16", "--steps", "1", "--warmup", "0", "--json", *options)
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, done.stdout.splitlines())
    assert row["ranks"] == 2
    assert row["images_per_s"] == pytest.approx(2 * 2 / row["median_s"], rel=0.01)
    assert row["efficiency"] == pytest.approx(row["alone_s"] / row["median_s"], rel=0.01)
    assert row["no_exchange_s"] > 0 and row["communication"] < 1


def test_an_error_is_printed_once(tmp_path):
    done = torchrun(tmp_path, "--steps", "0")
    assert done.returncode != 0
    assert done.stderr.count("Error: --steps 0 must be at least 1, --warmup 20 at least 0.") == 1


def test_a_baseline_under_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = "Error: --baseline times a script that knows one process. Run it without torchrun."
    assert main(["bench", "train", "--baseline", "script.py"]) == message


def test_batches_of_the_ranks():
    """Every rank has its own batches, and the captions of each come `repeat` times."""
    batches = list(random_batches(1, 2, 5, rank=0, repeat=2))
    texts = [batch["text_input"] for batch in batches]
    assert texts[0] == texts[1] != texts[2] == texts[3] != texts[4]
    other = next(random_batches(1, 2, 1, rank=1))
    assert other["text_input"] != texts[0]
    assert not other["image"].equal(batches[0]["image"])


def make_timer(monkeypatch, ranks: list[tuple]) -> ScalingTimer:
    """The first rank's timer. A rank has: seconds, without exchange, alone, losses, images, tokens, memory."""
    runner = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, module=torch.nn.Linear(1, 1))
    monkeypatch.setattr(dist_utils, "get_world_size", lambda: len(ranks))
    monkeypatch.setattr(dist_utils, "gather_objects", lambda own: ranks)
    timer = ScalingTimer(runner, iter([]))
    (
        timer.seconds,
        timer.no_exchange.seconds,
        timer.alone.seconds,
        timer.losses,
        timer.images,
        timer.tokens,
        timer.memory,
    ) = ranks[0]
    timer.phases = {name: [0.5, 0.5] for name in timer.phases}
    return timer


def test_summary(monkeypatch):
    """After one step of warm-up: the slowest rank, the sum of the work, the largest memory."""
    seconds, no_exchange, alone = [9.0, 2.0, 4.0, 4.0], [9.0, 1.0, 3.0, 3.0], [9.0, 2.0, 2.0, 2.0]
    first = (seconds, no_exchange, alone, [1.0] * 4, [16] * 4, [100] * 4, {"max_mem_MB": 7})
    seconds, no_exchange, alone = [8.0, 3.0, 2.0, 5.0], [9.0, 2.7, 2.0, 4.0], [9.0, 3.0, 3.0, 3.0]
    second = (seconds, no_exchange, alone, [2.0] * 4, [16] * 4, [200] * 4, {"max_mem_MB": 8})
    timer = make_timer(monkeypatch, [first, second])
    row = timer.summary(warmup=1)
    expected = {"median_s": 4.0, "min_s": 3.0, "max_s": 5.0, "images_per_s": 8.0, "tokens_per_s": 75, "max_mem_MB": 8}
    expected |= {"no_exchange_s": 3.0, "alone_s": 2.5, "efficiency": 0.625, "communication": 0.2}  # of 0.1, 0.25, 0.2
    assert row.items() >= expected.items()
    assert row["first_step_s"] == 9.0 and row["loss"] == 1.5
