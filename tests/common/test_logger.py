"""The log of a run that is kept in a file, and the places of progress lines."""

import logging
import math
from pathlib import Path

import pytest
import torch

from minigpt4.common.logger import MetricLogger, kept_console


@pytest.fixture(autouse=True)
def at_info():
    logging.getLogger().setLevel(logging.INFO)


def test_the_file_has_what_came_before_it(tmp_path):
    before = list(logging.getLogger().handlers)
    path = tmp_path / "console.log"
    with kept_console() as write_to:
        logging.info("first é")
        write_to(path)
        logging.warning("second")
        assert path.read_text(encoding="utf-8").count("\n") == 2  # at once
    logging.info("third")
    first, second = path.read_text(encoding="utf-8").splitlines()
    assert first.endswith("[INFO] first é") and second.endswith("[WARNING] second")
    assert logging.getLogger().handlers == before


def test_the_file_ends_with_the_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError), kept_console() as write_to:
        write_to(tmp_path / "console.log")
        1 / 0  # noqa: B018
    assert (tmp_path / "console.log").read_text().endswith("ZeroDivisionError: division by zero\n")


def test_a_file_that_cannot_be_written_is_reported(tmp_path, caplog):
    with kept_console() as write_to:
        write_to(tmp_path / "gone" / "console.log")
        logging.info("the run goes on")
    assert "is not kept" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_on_a_full_disk_the_run_goes_on(tmp_path, caplog, capsys):
    """With one warning; and the exception that ends it is its own."""
    (tmp_path / "console.log").symlink_to("/dev/full")
    with pytest.raises(ZeroDivisionError), kept_console() as write_to:
        write_to(tmp_path / "console.log")
        for number in range(3):
            logging.info("line %d", number)
        1 / 0  # noqa: B018
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert "No space left" in caplog.text and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("length", "log_freq"), [(7, 3), (8, 4), (5, 1), (3, 50)])
def test_places_of_lines(length, log_freq):
    lines = []
    logger = MetricLogger(on_line=lambda item, values: lines.append(item))
    for _ in logger.log_every(range(length), length, log_freq, ""):
        logger.update(loss=1.0)
    assert lines == sorted({*range(0, length, log_freq), length - 1})


def test_means_leave_out_what_is_not_finite():
    """Tensors are read at lines only; the latest value of a line may be NaN."""
    found, logger = [], MetricLogger(on_line=lambda item, values: found.append(values["loss"]))
    for item in logger.log_every(range(5), 5, 2, ""):
        logger.update(loss=torch.tensor([1.0, math.inf, math.nan, 4.0, 7.0][item]), lr=0.5)
    assert found[0] == 1 and math.isnan(found[1]) and found[2] == 7
    assert logger.global_avg() == {"loss": 4.0, "lr": 0.5}


def test_rates_are_of_the_time_since_the_last_line():
    found = []
    logger = MetricLogger(on_line=lambda item, values: found.append(values))
    for item in logger.log_every(range(4), 4, 2, ""):
        logger.update(loss=float(item))
        logger.count(images=3)
    assert [values["loss"] for values in found] == [0, 2, 3]
    for values, items in zip(found, (1, 2, 1), strict=True):
        assert values["images_per_second"] == pytest.approx(3 / values["step_seconds"], rel=1e-6), items


def test_a_pause_does_not_count(monkeypatch):
    clock, lines = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    metrics = MetricLogger(on_line=lambda item, values: lines.append(values["step_seconds"]))
    for item in metrics.log_every(range(4), 4, 2, "Train:"):
        metrics.update(loss=1.0)
        clock[0] += 2
        if item == 1:  # an evaluation
            clock[0] += 100
            metrics.pause(100)
    assert lines == [2, 2, 2]
