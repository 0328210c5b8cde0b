"""The scripts that start a run again, with a stand-in for the run and for Slurm."""

import os
import signal
import stat
import subprocess
import time

import pytest
from helpers import ROOT

# Notes its arguments, then ends with the next status of a list; `stop`: it waits for SIGTERM, and ends with 75.
RUN = """#!/usr/bin/env bash
cd "$(dirname "$0")"
trap 'exit 75' TERM
echo "$@" >> starts
status=$(sed -n "$(wc -l < starts)p" statuses)
if [ "$status" = stop ]; then while true; do sleep 0.05; done; fi
exit "$status"
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Function that starts a script with the stand-in, whose runs end with these statuses."""
    for name, text in (("run", RUN), ("scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")

    def script(name, *statuses):
        (tmp_path / "statuses").write_text("\n".join(map(str, statuses)) + "\n")
        return subprocess.Popen([ROOT / "scripts" / name, "run", "--options", "a=1"], stderr=subprocess.PIPE)

    return script


def started(tmp_path, count):
    """Wait until the stand-in was started so many times; its arguments."""
    deadline, file = time.monotonic() + 20, tmp_path / "starts"
    while not file.exists() or len(file.read_text().splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return file.read_text().splitlines()


@pytest.mark.parametrize(
    ("statuses", "expected"), [([0], 0), ([75, 75, 0], 0), ([1, 75, 1, 1, 1], 1), ([2, 2, 2, 0], 2)]
)
def test_a_run_is_started_until_it_is_done(start, tmp_path, statuses, expected):
    assert start("train_and_requeue.sh", *statuses).wait(20) == expected
    lines = started(tmp_path, 1)
    assert set(lines) == {"--options a=1 run.resume_ckpt_path=auto"}
    assert len(lines) == (3 if expected == 2 else len(statuses))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("script", ["train_and_requeue.sh", "slurm.sh"])
def test_a_signal_is_passed_on(start, tmp_path, script, number):
    process = start(script, "stop")
    started(tmp_path, 1)
    time.sleep(0.1)  # the stand-in has set its trap before it notes its start; the shell waits for it now
    process.send_signal(number)
    assert process.wait(20) == (0 if script == "slurm.sh" else 75)
    if script == "slurm.sh":
        assert (tmp_path / "requeued").read_text() == "requeue 17\n"


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (75, True)])
def test_slurm_requeues_what_can_go_on(start, tmp_path, status, requeued):
    assert start("slurm.sh", status).wait(20) == (0 if requeued else status)
    assert (tmp_path / "requeued").exists() == requeued
