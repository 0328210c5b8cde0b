"""The next batch is made ready while the GPU works on this one: tokenised by a thread, copied on its own stream."""

import queue
import sys
import threading
from collections.abc import Iterable, Iterator

import torch

from minigpt4.fast.cuda_graphs import CAPTURE_LOCK
from minigpt4.runners.state import to_device

# Batches that wait on the device, beside the one in use.
AHEAD = 2
# Seconds that the thread gets to end when it is no longer needed. It may be waiting for data that never come.
PATIENCE = 5
# Seconds that a thread of this process may run Python while another waits for its turn, from now on. With Python's own
# 5 ms the GPU stood idle for 2 ms a step: its next work was not launched while the thread tokenised.
TURN = 1e-4


def prefetch(batches: Iterable[dict], model, device: torch.device) -> Iterator[dict]:
    """Each batch, in order, through the model's `prepare` and on `device`. An error of the thread is raised here.

    Close it (`contextlib.closing`) where its consumer may fail: that ends the thread.
    """
    prepare = getattr(model, "prepare", lambda samples: samples)
    if device.type != "cuda":
        for samples in batches:
            yield to_device(prepare(samples), device)
        return
    ready: queue.Queue = queue.Queue(AHEAD)
    abandoned = threading.Event()
    copies = torch.cuda.Stream(device)

    def copied(samples: dict) -> tuple[dict, torch.cuda.Event]:
        # Torch keeps pinned memory until it is copied. It is given back in here, while no graph is recorded.
        with CAPTURE_LOCK, torch.cuda.stream(copies):
            moved = to_device({key: _pinned(value) for key, value in samples.items()}, device)
            return moved, copies.record_event()

    def produce() -> None:
        try:
            for samples in batches:
                if not _put(ready, copied(prepare(samples)), abandoned):
                    return
            _put(ready, None, abandoned)
        except BaseException as error:  # whatever it is, it belongs to the one who waits
            _put(ready, error, abandoned)

    thread = threading.Thread(target=produce, daemon=True, name="prefetch")
    sys.setswitchinterval(TURN)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            moved, done = item
            torch.cuda.current_stream(device).wait_event(done)
            for value in moved.values():
                if hasattr(value, "record_stream"):
                    value.record_stream(torch.cuda.current_stream(device))
            yield moved
    finally:
        abandoned.set()
        thread.join(PATIENCE)


def _pinned(value):
    return value.pin_memory() if hasattr(value, "pin_memory") else value


def _put(ready: queue.Queue, item, abandoned: threading.Event) -> bool:
    while not abandoned.is_set():
        try:
            ready.put(item, timeout=0.1)
            return True
        except queue.Full:
            continue
    return False
