"""Data workers that die, hang, fail, or lose their main process."""

import gc
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from helpers import ROOT
from torch.utils.data import Dataset, IterableDataset

from minigpt4.common import dist_utils
from minigpt4.datasets import patience, workers
from minigpt4.datasets.left_out import Tally
from minigpt4.datasets.loaders import TrainLoader, eval_loader
from minigpt4.datasets.patience import Patience
from minigpt4.datasets.workers import DataWorkerError, name_dead_workers


class Faulty(Dataset):
    """In a worker it goes wrong at sample 5, or when it reads the file of that sample."""

    def __init__(self, fault):
        self.fault = fault
        self.patience = Patience(Tally("mine"), lambda path: True)

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == 5:
            self.patience.retry(getattr(self, self.fault), "/data/5.jpg")
        return {"image": torch.zeros(1), "text_input": "a"}

    def dies(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def hangs(self):
        time.sleep(600)

    def fails(self):
        raise KeyError("no such key")


class FaultyStream(Faulty, IterableDataset):
    def __iter__(self):
        while True:
            yield from (self[index] for index in range(len(self)))

    def one_pass(self, reader, num_readers):
        return iter([self[index] for index in range(reader, len(self), num_readers)])


@pytest.fixture
def impatient(monkeypatch):
    for name, seconds in (("QUIET", 0.2), ("GRACE", 0.6), ("LOOK", 0.1)):
        monkeypatch.setattr(workers, name, seconds)


def batches_of(dataset, evaluated):
    if evaluated:
        return eval_loader(dataset, 2, 1, timeout_s=0.0)
    return TrainLoader({"mine": dataset}, None, 2, 1, seed=0, timeout_s=0.0).epoch(0, 6)


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("kind", [Faulty, FaultyStream])
@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_a_worker_that_dies_or_hangs_is_named(impatient, kind, fault, evaluated, caplog):
    """With the batch, the dataset and the file, and nothing waits for it for ever."""
    what = r"(batch \d+|the start) of " + ("an evaluation" if evaluated else r"datasets\.mine")
    with (
        pytest.raises(DataWorkerError, match=rf"has died: process \d+, which was at {what}.*, /data/5\.jpg"),
        name_dead_workers(),
    ):
        list(batches_of(kind(fault), evaluated))
    if fault == "hangs":
        assert "Waiting for a batch for" in caplog.text and "A data worker hangs, and is ended" in caplog.text


def test_workers_end_with_a_loader_that_python_collects():
    """torch alone waits 10 s for each of them."""
    loader = TrainLoader({"mine": Faulty("fails")}, None, 2, 2, seed=0)
    batches = loader.epoch(0, 6)
    next(batches)
    pids = [child.pid for child in psutil.Process().children()]
    circle = [loader, batches]
    circle.append(circle)
    del loader, batches, circle
    start = time.monotonic()
    gc.collect()
    assert time.monotonic() - start < 10 and not any(map(psutil.pid_exists, pids))


def test_a_worker_that_hangs_is_named_before_other_ranks_give_up(monkeypatch, caplog):
    """They wait for `run.timeout_minutes`, here 2 s, which is less than `run.data_timeout_s`."""
    monkeypatch.setattr(workers, "LOOK", 0.1)
    monkeypatch.setattr(dist_utils, "others_wait_s", 2.0)
    start = time.monotonic()
    with pytest.raises(DataWorkerError, match=r"datasets\.mine, /data/5\.jpg"), name_dead_workers():
        list(TrainLoader({"mine": Faulty("hangs")}, None, 2, 1, seed=0).epoch(0, 6))
    assert time.monotonic() - start < 300 and "Waiting for a batch for" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_names_the_batch(num_workers):
    loader = TrainLoader({"mine": Faulty("fails")}, None, 2, num_workers, seed=0)
    with pytest.raises(KeyError) as found, name_dead_workers():
        list(loader.epoch(0, 6))
    said = "".join([str(found.value), *getattr(found.value, "__notes__", [])])
    assert "of datasets.mine" in said


def test_without_workers_a_wait_is_logged(impatient, monkeypatch, caplog):
    """In the main process, which nothing can end."""

    def until_logged(self):
        deadline = time.monotonic() + 30
        while "/data/5.jpg" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)

    monkeypatch.setattr(Faulty, "hangs", until_logged)
    assert len(list(TrainLoader({"mine": Faulty("hangs")}, None, 2, 0, seed=0, timeout_s=0.0).epoch(0, 6))) == 6
    assert "datasets.mine, /data/5.jpg" in caplog.text and "is ended" not in caplog.text


def test_texts_that_are_long_or_no_utf_8():
    status = workers.WorkerStatus(1)
    write = status.writer(0)
    for text in ("ä" * 1000, "a\udcff b", "", "short"):
        write(text)
        ((pid, _, seen),) = status.read()
        assert pid == os.getpid() and (seen == text or text[:1] in "äa")
    assert patience._batch == ""


@pytest.mark.slow
def test_no_worker_outlives_a_main_process_that_is_killed():
    """Idle, reading from a command, which ends as well, and with a batch that nobody takes."""
    code = """if True:
        import subprocess, sys, time, torch
        sys.path[:0] = ["tests", "tests/datasets"]
        from test_workers import Faulty
        from minigpt4.datasets.loaders import TrainLoader
        sample = {"image": torch.zeros(10**7), "text_input": "a"}
        Faulty.__getitem__ = lambda self, i: subprocess.run(["sleep", "60"]) if i > 9 else sample
        for batch in TrainLoader({"mine": Faulty("")}, None, 1, 4, seed=0).epoch(0, 12):
            print("ready", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    children, deadline = [], time.monotonic() + 30
    while "sleep" not in [each.name() for each in children] and time.monotonic() < deadline:
        children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 5
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
