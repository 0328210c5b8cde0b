"""Trackers: their numbers are those of metrics.jsonl, and none of them can hold up a run."""

import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT
from PIL import Image

from minigpt4.common.registry import registry
from minigpt4.tracking import process
from minigpt4.tracking.metrics import read_metrics
from minigpt4.tracking.record import RunRecord
from minigpt4.tracking.trackers import RunInfo

OWN = ("step", "time")  # of the file
LINES = [(step, {"epoch": 0, "loss": 1 / (step + 2), "lr": 1e-5 / step, "left_out/a/b c": step}) for step in (1, 2, 3)]
LINES.append((3, {"val_loss": math.pi, "share/cc_sbu": 2 / 3}))


def record_of(folder, *trackers):
    return RunRecord(RunInfo("job-12ab", "my run", str(folder), {"run": {"init_lr": 0.1}}), trackers)


def write(record):
    for step, values in LINES:
        record.log(step, values)
    record.close()


def by_tensorboard(folder):
    """{(step, name): number} as TensorBoard reads its files, and its tags of texts and pictures."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    tensors = {tag: events.Tensors(tag) for tag in events.Tags()["tensors"]}
    found = {(e.step, tag): make_ndarray(e.tensor_proto).item() for tag, each in tensors.items() for e in each}
    return found | {(e.step, tag): "a picture" for tag in events.Tags()["images"] for e in events.Images(tag)}


def by_wandb(folder):
    """{(step, name): value} of W&B's file, which is in the log format of LevelDB; and the run's id and name."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content, at, whole, found, about = path.read_bytes(), 7, b"", {}, ()
    while at < len(content):
        if 2**15 - at % 2**15 < 7:  # records do not begin in the last bytes of a block
            at += 2**15 - at % 2**15
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record.FromString(whole)
            whole = b""
            if record.HasField("run"):
                about = record.run.run_id, record.run.display_name
            values = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            found |= {(values.get("_step"), name): value for name, value in values.items()}
    return {key: value for key, value in found.items() if key[1][0] != "_"}, about


@pytest.mark.slow
def test_all_have_the_numbers_of_the_file_to_the_last_digit(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "PATIENCE", 60)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    record = record_of(tmp_path, "tensorboard", "wandb", "trackio")
    record.log(1, {"answer": "a cat", "picture": Image.new("L", (8, 6))})
    write(record)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    expected = {(line["step"], name): value for line in lines for name, value in line.items() if name not in OWN}
    shown = {key: value for key, value in by_tensorboard(tmp_path).items() if key[1] not in ("answer", "picture")}
    assert shown == {key: value for key, value in expected.items() if key[1] != "answer"}
    assert {(1, "answer"): b"a cat", (1, "picture"): "a picture"}.items() <= by_tensorboard(tmp_path).items()
    logged, about = by_wandb(tmp_path)
    assert about == ("job-12ab", "my run") and logged[1, "picture.format"] == "png"
    assert {key: value for key, value in logged.items() if not key[1].startswith("picture.")} == expected
    code = (
        "import json, trackio; from trackio.sqlite_storage import SQLiteStorage as s; "
        "print('\\n', json.dumps(s.get_logs('minigpt4', 'my run job-12ab'), default=str))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    kept = {(line["step"], name): value for line in json.loads(said.splitlines()[-1]) for name, value in line.items()}
    assert expected.items() <= kept.items()


@pytest.fixture
def plug_in(tmp_path, monkeypatch, open_registry):
    """Registers a tracker with these lines of code as "mine", from a module on the import path."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(process, "PATIENCE", 60)

    def write_module(init="", log="", close=""):
        (tmp_path / "my_tracker.py").write_text(
            f"""
import os, pathlib, time
from minigpt4.common.registry import registry
from minigpt4.tracking.trackers import Tracker

@registry.register("tracker", "mine")
class Mine(Tracker):
    def __init__(self, run):
        self.file = pathlib.Path(run.folder, "mine.txt")
        self.file.write_text(f"{{run.id}}, {{run.name}}, {{run.config['run']}}")
        {init or "pass"}

    def log(self, step, values):
        self.file.write_text(f"{{self.file.read_text()}}\\\\n{{step}} {{values}}")
        {log or "pass"}

    def close(self):
        {close or "pass"}
        self.file.write_text(self.file.read_text() + "\\\\nclosed")
""".replace("\\\\", "\\")
        )
        sys.modules.pop("my_tracker", None)
        __import__("my_tracker")
        return tmp_path / "mine.txt"

    yield write_module
    sys.modules.pop("my_tracker", None)


def test_a_plug_in_gets_the_lines(plug_in, tmp_path, caplog):
    file = plug_in(init="print('noise')")
    write(record_of(tmp_path, "mine"))
    about, *lines, end = file.read_text().splitlines()
    assert about == "job-12ab, my run, {'init_lr': 0.1}" and end == "closed"
    assert lines == [f"{step} {values}" for step, values in LINES]
    assert not caplog.text


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({"init": "raise OSError('no room')"}, "OSError: no room"),
        ({"log": "raise ValueError('a line')"}, "ValueError: a line"),
        ({"log": "os.kill(os.getpid(), 9)"}, "status -9"),
        ({"close": "1 / 0"}, "ZeroDivisionError"),
        ({"init": "time.sleep(99)"}, "has not finished"),
        ({"log": "time.sleep(99)"}, "has not finished"),
        ({"close": "time.sleep(99)"}, "has not finished"),
    ],
)
def test_a_tracker_that_fails_or_hangs_is_dropped(plug_in, tmp_path, monkeypatch, caplog, broken, words):
    """With one warning; the file has everything."""
    plug_in(**broken)
    if "sleep" in str(broken):
        monkeypatch.setattr(process, "PATIENCE", 1)
    record = record_of(tmp_path, "mine")
    start = time.monotonic()
    write(record)
    assert time.monotonic() - start < 300
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 3]
    (warning,) = caplog.records
    assert "mine is dropped" in warning.getMessage() and words in warning.getMessage()


@pytest.mark.parametrize("broken", [{"log": "raise ValueError('a line')"}, {}])
def test_forked_processes_hold_nothing_up(plug_in, tmp_path, caplog, broken):
    """One of the tracker that fails, one of the run (a data worker): each holds a pipe between the two open."""
    file = plug_in(init="if os.fork() == 0: time.sleep(99)" if broken else "", **broken)
    record, start = record_of(tmp_path, "mine"), time.monotonic()
    record.log(*LINES[0])
    worker = None if broken else subprocess.Popen(["sleep", "99"], pass_fds=_pipes(record))
    write(record)
    assert time.monotonic() - start < 50  # seconds; both processes live longer
    assert "a line" in caplog.text if broken else not caplog.text and "closed" in file.read_text()
    if worker:
        worker.kill()


def _pipes(record):
    return [tracker._process.stdin.fileno() for tracker in record._trackers]


def test_a_value_that_cannot_be_sent_is_named(plug_in, tmp_path, caplog):
    plug_in()
    record = record_of(tmp_path, "mine")
    record.log(1, {"loss": 0.5, "odd": lambda: 0})
    wait_for(lambda: record._trackers[0]._process.poll() is not None)
    record.log(2, {"loss": 0.25})
    record.close()
    (warning,) = caplog.records
    assert "mine is dropped" in warning.getMessage() and "pickle" in warning.getMessage()


def test_a_tracker_that_reads_no_more_is_dropped_while_the_run_goes_on(plug_in, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(process, "MAX_WAITING", 3)
    plug_in(log="time.sleep(99)")
    record = record_of(tmp_path, "mine")
    start = time.monotonic()
    for step in range(20):
        record.log(step, {"text": "x" * 100_000})  # more than a pipe holds
    assert time.monotonic() - start < 300
    (warning,) = caplog.records
    assert "3 lines wait for it" in warning.getMessage()
    record.close()


def test_a_tracker_closes_when_its_run_is_killed(plug_in, tmp_path):
    file = plug_in()
    code = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]
import my_tracker
from minigpt4.tracking.record import RunRecord
from minigpt4.tracking.trackers import RunInfo
RunRecord(RunInfo("id", "name", {str(tmp_path)!r}, {{"run": {{}}}}), ["mine"]).log(1, {{"loss": 1}})
time.sleep(99)
"""
    run = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: file.is_file() and "loss" in file.read_text())
    run.send_signal(signal.SIGKILL)
    run.wait()
    wait_for(lambda: file.read_text().endswith("closed"))


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_a_network_that_hangs_delays_the_end_by_what_is_allowed(tmp_path, monkeypatch, caplog):
    """W&B of a server that accepts connections and never answers."""
    monkeypatch.setattr(process, "PATIENCE", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        record = record_of(tmp_path, "wandb")
        record.log(*LINES[0])
        connection, _ = server.accept()
        start = time.monotonic()
        record.close()
        assert time.monotonic() - start < 30
        connection.close()
    assert "wandb is dropped" in caplog.text


def test_trackers_need_no_torch_and_are_imported_when_they_are_asked_for():
    code = "import sys, minigpt4.tracking.record as r; print({'torch', 'wandb', 'tensorboard'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "set()\n", done.stderr


def test_names_of_ours():
    assert registry.names("tracker") == ["tensorboard", "trackio", "wandb"]
    assert all(registry.get("tracker", name).package == name for name in registry.names("tracker"))
    assert Path(process.__file__).is_file() and os.environ.get("WANDB_API_KEY") is None
