"""Prepares the next batch while the GPU computes: a thread tokenises it and copies it on a stream of its own."""

import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch

from minigpt4.fast.cuda_graphs import CAPTURE_LOCK
from minigpt4.runners.state import MAKING, host_rng_state, to_device

# Prefetched batches on the device, beside the one in use.
AHEAD = 2
# Seconds to wait for the thread to end. It may be waiting for data that never come.
PATIENCE = 5
# Python's switch interval in seconds. With the default of 5 ms the GPU was idle for 2 ms a step: the main thread could
# not launch its next work while this thread tokenised.
SWITCH_INTERVAL = 1e-4


def prefetch(
    batches: Iterable[dict],
    model,
    device: torch.device,
    waiting: Callable[[], AbstractContextManager] = nullcontext,
    note_rng: Callable[[dict], None] = lambda state: None,
    by_thread: bool = True,
) -> Iterator[dict]:
    """Each batch, in order, after the model's `prepare` and on `device`. An error of the thread is raised here.

    Close the iterator (`contextlib.closing`) if the consumer may fail: that ends the thread.

    waiting: the context of a wait for the next batch.
    note_rng: is called with the host's random states after the batch's `prepare`, if a thread prepares ahead.
    by_thread: whether a thread makes the batches if `device` is a GPU. Without data workers none can: making a batch
        sets the random states of the process, and torch.compile, in the calling thread, sets them back.
    """
    prepare = getattr(model, "prepare", lambda samples: samples)
    source = iter(batches)
    if device.type != "cuda" or not by_thread:
        while True:
            with waiting():
                samples = next(source, None)
            if samples is None:
                return
            yield to_device(prepare(samples), device)
    yield from _by_thread(source, prepare, device, waiting, note_rng)


def _by_thread(source: Iterator[dict], prepare: Callable, device: torch.device, waiting, note_rng) -> Iterator[dict]:
    ready: queue.Queue = queue.Queue(AHEAD)
    abandoned = threading.Event()
    copies = torch.cuda.Stream(device)

    def copied(samples: dict) -> tuple[dict, torch.cuda.Event, dict]:
        # torch keeps pinned memory until the copy is done, and frees it inside this lock, while no graph is captured.
        with CAPTURE_LOCK, torch.cuda.stream(copies):
            moved = to_device({key: _pinned(value) for key, value in samples.items()}, device)
            return moved, copies.record_event(), host_rng_state()

    def produce() -> None:
        try:
            item = True
            while item is not None and not abandoned.is_set():
                with MAKING:
                    samples = next(source, None)
                    item = None if samples is None else copied(prepare(samples))
                ready.put(item)
        except BaseException as error:  # raised again by the consumer
            ready.put(error)

    thread = threading.Thread(target=produce, daemon=True, name="prefetch")
    sys.setswitchinterval(SWITCH_INTERVAL)
    thread.start()
    try:
        while True:
            with waiting():
                item = ready.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            moved, done, rng = item
            note_rng(rng)
            torch.cuda.current_stream(device).wait_event(done)
            for value in moved.values():
                if hasattr(value, "record_stream"):
                    value.record_stream(torch.cuda.current_stream(device))
            yield moved
    finally:
        abandoned.set()
        while not ready.empty():  # the thread may wait for room in the queue
            ready.get_nowait()
        thread.join(PATIENCE)


def _pinned(value):
    return value.pin_memory() if hasattr(value, "pin_memory") else value
