"""metrics.jsonl: full precision, and lines that are cut off."""

import math

import numpy as np
import pytest
import torch

from minigpt4.tracking.metrics import MetricsFile, read_metrics
from minigpt4.tracking.plot import read_run
from minigpt4.tracking.record import RunRecord
from minigpt4.tracking.trackers import RunInfo


def test_numbers_keep_every_digit(tmp_path):
    values = {"loss": 1 / 3, "lr": 1e-300, "count": 2**60, "nan": math.nan, "inf": -math.inf, "text": 'é\n"', "no": []}
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(3, values)
    (line,) = read_metrics(file.path)
    del values["no"]  # a picture, for example
    assert line.pop("time") > 1e9
    assert line == {"step": 3, **values, "nan": None, "inf": None}


def test_numbers_are_the_same_for_all_readers(tmp_path):
    """Whole numbers that some of them would round, or refuse, and those of NumPy and torch."""
    given = {"a": 2**53, "b": 2**53 + 1, "c": 10**400, "d": np.int64(3), "e": torch.tensor(0.5), "f": True}
    record = RunRecord(RunInfo("1", "run", str(tmp_path), {}), [])
    record.log(1, {**given, "g": torch.ones(2), "h": np.float32(0.25)})
    record.close()
    (line,) = read_metrics(tmp_path / "metrics.jsonl")
    found = {"a": 2**53, "b": 2.0**53, "c": None, "d": 3, "e": 0.5, "f": True, "h": 0.25}
    assert {name: line[name] for name in line if name not in ("step", "time")} == found
    assert isinstance(line["b"], float) and isinstance(line["d"], int)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1' + "0" * 400 + '}\n{"step": 1' + "0" * 30 + "}\n")
    assert read_run(tmp_path).curve("loss") == ([1], [math.inf])


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_line_that_was_cut_off_is_ended_and_passed_over(tmp_path, cut):
    """At any byte, as by kill -9 or a full disk."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        file.write(step, {"loss": 0.12345678})
    whole = file.path.read_bytes()
    file.path.write_bytes(whole[:-cut])
    MetricsFile(file.path).write(3, {"loss": 3})
    # without its line break alone, the second line is whole
    assert [line["step"] for line in read_metrics(file.path)] == ([1, 2, 3] if cut == 1 else [1, 3])


def test_lines_of_other_kinds_are_passed_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n[1]\n{"loss": 1}\n\xff\n{"step": 2}\n')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_a_disk_that_is_full_costs_lines_and_one_warning(tmp_path, caplog):
    file = MetricsFile(tmp_path / "gone" / "metrics.jsonl")
    file.write(1, {"loss": 1})
    file.write(2, {"loss": 2})
    file.path.parent.mkdir()
    file.write(3, {"loss": 3})
    assert [line["loss"] for line in read_metrics(file.path)] == [3]
    assert caplog.text.count("metrics.jsonl are missing") == 1
