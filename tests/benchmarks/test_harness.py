"""What the benchmarks share."""

import json

import torch

from minigpt4.benchmarks.harness import peak_memory, report, time_in_turn, timed

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


def test_calls_of_one_method_are_timed_for_a_while():
    class Owner:
        def method(self, a, b):
            return a, b

        def other(self):
            return 0

    owner = Owner()
    with timed(owner, "method", CPU) as seconds:
        assert owner.other() == 0 and seconds == []
        assert owner.method(1, b=2) == (1, 2)
        assert len(seconds) == 1 and seconds[0] > 0
        owner.method(1, 2)
    owner.method(1, 2)
    assert len(seconds) == 2 and not vars(owner)


def test_no_memory_without_a_gpu():
    assert peak_memory(CPU) == {}
