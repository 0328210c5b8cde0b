"""Signals and kills in every phase of a run: it ends with its status, and goes on exactly."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT, Augmented, Pictures, facts_of

from minigpt4.common.stopping import REQUEUE, STOP, Stopped
from minigpt4.runners import RunnerBase, run_log
from minigpt4.runners.validation import Validation
from minigpt4.weights import checkpoint


@pytest.fixture(autouse=True)
def handlers():
    """A run that was stopped ignores further signals until its process ends; the tests' own process goes on."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def at_call(call, monkeypatch, owner, name, then=lambda: None, number=signal.SIGTERM):
    """Send a signal (0: none) to this process in call number `call` of a function."""
    function, calls = getattr(owner, name), []

    def sending(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
            then()
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, sending)


# Phase: the function in which the signal comes, and the number of its call.
PHASES = {
    "first step": (RunnerBase, "train_step", 1),
    "a step in the middle of accumulation": (RunnerBase, "train_step", 4),
    "update": (RunnerBase, "optimizer_step", 3),
    "evaluation after an epoch": (RunnerBase, "evaluate", 1),
    "saving": (checkpoint, "save", 1),
    "data that do not come": (Augmented, "__getitem__", 14),
    "evaluation data that do not come": (Pictures, "__getitem__", 2),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_signal_in_every_phase(run, monkeypatch, tmp_path, phase):
    """The run ends soon, with the status by which a job script requeues, and goes on exactly."""
    owner, name, call = PHASES[phase]
    settings = {"accum_grad_iters": 2, "valid_splits": "[val]", "resume_ckpt_path": "auto", "save_every_steps": 2}
    expected = facts_of(run("whole", **settings, output_dir=str(tmp_path / "whole")))
    start = time.monotonic()
    with monkeypatch.context() as patch:
        at_call(call, patch, owner, name, lambda: time.sleep(60 if "data" in phase else 0))
        with pytest.raises(Stopped) as stopped, STOP:
            run("stopped", **settings)
    assert stopped.value.status == REQUEUE == 75 and time.monotonic() - start < 30
    resumed = run("resumed", **settings)
    torch.testing.assert_close(facts_of(resumed), expected, rtol=0, atol=0)


def test_a_run_whose_output_nobody_reads_has_its_status():
    code = "from minigpt4.common.stopping import leave; input(); print('a line'); leave(75)"
    command, pipe = [sys.executable, "-E", "-c", code], subprocess.PIPE  # without PYTHONUNBUFFERED
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=ROOT) as process:
        process.stdout.close()
        process.stdin.write(b"\n")
    assert process.returncode == 75


def test_the_second_signal_leaves_at_once():
    """Also while the first one is waited for; before the first step there is nothing to wait for."""
    statuses = []
    for begun, number in ((True, signal.SIGTERM), (True, signal.SIGINT), (False, signal.SIGUSR1)):
        if not (child := os.fork()):
            try:
                with STOP:
                    if begun:
                        STOP.begin_steps()
                    os.kill(os.getpid(), number)
                    os.kill(os.getpid(), number)
            except Stopped as stop:
                os._exit(stop.status)
            os._exit(1)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    assert statuses == [128 + signal.SIGTERM, 128 + signal.SIGINT, REQUEUE]


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        (RunnerBase, "log_stats", 1),
        (run_log, "log_epoch", 2),
        (Validation, "after_epoch", 1),
        (Validation, "state", 5),
        (checkpoint.os, "replace", 3),
        (checkpoint.os, "fsync", 3),
    ],
)
def test_a_kill_between_two_files(run, monkeypatch, tmp_path, owner, name, call):
    """Numbers that were written before a checkpoint, or after it, are there once."""
    settings = {"resume_ckpt_path": "auto", "save_every_steps": 2, "valid_splits": "[val]"}
    expected = facts_of(run("whole", **settings, output_dir=str(tmp_path / "whole")))
    if not (child := os.fork()):
        at_call(call, monkeypatch, owner, name, lambda: os.kill(os.getpid(), signal.SIGKILL), number=0)
        run("killed", **settings)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    torch.testing.assert_close(facts_of(run("last", **settings)), expected, rtol=0, atol=0)


def test_kills_at_random_moments(run, tmp_path):
    """`scripts/kill_runs.py` in short: kill -9 until the run is done, without a step that is lost twice."""
    settings = {"max_epoch": 4, "resume_ckpt_path": "auto", "save_every_steps": 1, "valid_splits": "[val]"}
    start = time.monotonic()
    expected = facts_of(run("whole", **settings, output_dir=str(tmp_path / "whole")))
    seconds, draw = time.monotonic() - start, random.Random(1)
    for number in range(4):
        if not (child := os.fork()):
            run(f"killed{number}", **settings)
            os._exit(0)
        time.sleep(draw.uniform(0.1, 0.7) * seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    torch.testing.assert_close(facts_of(run("last", **settings)), expected, rtol=0, atol=0)
