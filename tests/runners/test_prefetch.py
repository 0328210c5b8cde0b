"""Prefetching by a thread, as on a GPU, with stand-ins for CUDA streams."""

import contextlib
import random
import threading
import time

import pytest
import torch

from minigpt4.runners import prefetch as module
from minigpt4.runners.prefetch import AHEAD, prefetch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Stream:
    """Records the events that it waits for."""

    def __init__(self, device=None):
        self.waited = []

    def record_event(self):
        return object()

    def wait_event(self, event):
        self.waited.append(event)


@pytest.fixture
def fake_gpu(monkeypatch):
    """Streams without a GPU; batches stay where they are. Returns the consumer's stream."""
    current = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(module, "to_device", lambda samples, device: samples)
    return current


class Doubling:
    def prepare(self, samples):
        return {"n": 2 * samples["n"]}


def numbers(count, made=None):
    for n in range(count):
        if made is not None:
            made.append(n)
        yield {"n": n}


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_every_batch_once_in_order(fake_gpu, device):
    assert [batch["n"] for batch in prefetch(numbers(20), Doubling(), device)] == [*range(0, 40, 2)]
    assert len(fake_gpu.waited) == (20 if device == CUDA else 0)
    assert not prefetch_threads()


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_model_without_prepare(fake_gpu, device):
    assert [batch["n"] for batch in prefetch(numbers(3), torch.nn.Linear(1, 1), device)] == [0, 1, 2]


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_an_error_comes_after_the_batches_before_it(fake_gpu, device):
    def broken():
        yield from numbers(2)
        raise OSError("shard 7 is cut off")

    seen = []
    with pytest.raises(OSError, match="shard 7"):
        for batch in prefetch(broken(), Doubling(), device):
            seen.append(batch["n"])
    assert seen == [0, 2]
    assert not prefetch_threads()


def test_no_more_batches_are_made_than_wait(fake_gpu):
    made = []
    with contextlib.closing(prefetch(numbers(100, made), Doubling(), CUDA)) as batches:
        next(batches)
        time.sleep(0.3)
        assert len(made) == 1 + AHEAD + 1  # in use, waiting, and one that the thread has finished
    assert not prefetch_threads()


def test_a_consumer_that_fails_ends_the_thread(fake_gpu, build_golden_model, make_runner, pool, monkeypatch):
    """Afterwards no thread draws from the random states any more."""
    runner = make_runner(build_golden_model(), iters_per_epoch=50)
    monkeypatch.setattr(runner, "device", CUDA)
    monkeypatch.setattr(module, "_pinned", lambda value: value)
    runner.loader.epoch = lambda epoch, count, first: (
        {"image": pool[0][:2], "text_input": pool[1][:2]} for _ in range(count)
    )
    runner.train_step = lambda samples, is_update: 1 / 0
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr("minigpt4.fast.packing.batch.PackedBatch.record_stream", lambda batch, stream: None)
    try:
        runner.train_epoch(0)
    except ZeroDivisionError as error:
        assert error.__traceback__ and not prefetch_threads()
        state = random.getstate()
        time.sleep(0.2)
        assert random.getstate() == state
    else:
        pytest.fail("the error was lost")


def test_the_consumers_own_thread_may_make_the_batches(fake_gpu):
    makers = []

    def batches():
        for n in range(3):
            makers.append(threading.current_thread())
            yield {"n": n}

    assert [batch["n"] for batch in prefetch(batches(), Doubling(), CUDA, by_thread=False)] == [0, 2, 4]
    assert set(makers) == {threading.current_thread()}


def test_an_iterator_that_is_never_used_starts_nothing(fake_gpu):
    prefetch(numbers(3), Doubling(), CUDA).close()
    assert not prefetch_threads()
