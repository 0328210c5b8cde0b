"""What the benchmarks share."""

import json
from types import SimpleNamespace

import torch

from minigpt4.benchmarks.harness import Stopwatch, Timed, peak_memory, report, time_in_turn

CPU = torch.device("cpu")


def test_a_row_as_json_and_as_text(capsys):
    row = {"work": "S1/16", "median_s": 0.5}
    report(row, as_json=True)
    report(row, as_json=False)
    as_json, as_text = capsys.readouterr().out.splitlines()
    assert json.loads(as_json) == row
    assert as_text == "work: S1/16  median_s: 0.5"


def test_calls_take_turns_and_the_warm_up_does_not_count():
    now, order = iter(range(100)), []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    seconds = time_in_turn(calls, rounds=2, warmup=1, read=lambda: next(now))
    assert order == ["a", "b"] * 3
    assert seconds == {"a": [1, 1], "b": [1, 1]}


def test_the_stopwatch_runs_during_one_method():
    watch = Stopwatch(CPU)
    wrapped = SimpleNamespace(timed=lambda a, b: (a, b), other=lambda: watch.seconds)
    stand_in = Timed(wrapped, "timed", watch)
    assert stand_in.other() == 0
    assert stand_in.timed(1, b=2) == (1, 2)
    once = stand_in.other()
    assert once > 0
    stand_in.timed(1, 2)
    assert watch.seconds > once


def test_no_memory_without_a_gpu():
    assert peak_memory(CPU) == {}
