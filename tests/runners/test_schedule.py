"""The length and the expected time of a run, as it logs them."""

import re

import pytest

from minigpt4.runners.schedule import EtaLogger, TrainingSchedule


def test_a_run_logs_its_length(build_golden_model, make_runner, caplog):
    caplog.set_level("INFO")
    runner = make_runner(build_golden_model(), iters_per_epoch=5, max_epoch=2, accum_grad_iters=2, log_freq=2)
    runner.train()
    said = [r.getMessage() for r in caplog.records]
    start = said.index("Start training epoch 0, 5 iters per inner epoch.")
    assert said[start - 1] == (
        "Batch 3 per process, 6 in total (1 process, 2 batches a step); 2 epochs of 5 batches = 6 steps, 30 samples."
    )
    expected = [line for line in said if re.fullmatch(r"At \d+\.\d{3} s a batch the run will take \d+ s, .*", line)]
    assert len(expected) == 1
    assert start < said.index(expected[0]) < said.index("Start training epoch 1, 5 iters per inner epoch.")


@pytest.mark.parametrize(("iters", "log_freq", "logged_at"), [(200, 50, 51), (200, 1, 2), (30, 50, 29), (2, 50, None)])
def test_the_time_is_logged_once(monkeypatch, caplog, iters, log_freq, logged_at):
    caplog.set_level("INFO")
    clock = iter(range(10**6))
    monkeypatch.setattr("minigpt4.runners.schedule.time.perf_counter", lambda: next(clock))
    eta = EtaLogger(TrainingSchedule(1, 1, iters, 3), log_freq)
    steps = []
    for epoch in range(3):
        for i in range(iters):
            before = len(caplog.records)
            eta.step(i)
            steps += [(epoch, i)] if len(caplog.records) > before else []
    assert steps == ([(0, logged_at)] if logged_at else [])
