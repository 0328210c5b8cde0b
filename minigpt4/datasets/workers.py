"""Data workers: what each of them reads, and the end of those that hang, die, or have lost their main process.

A worker writes the batch and the file that it is at (`patience.at_batch`) into memory that it shares with the main
process.
"""

import atexit
import logging
import os
import re
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch.utils.data import DataLoader, Dataset

from minigpt4.common.dist_utils import own_patience
from minigpt4.common.stopping import end_children, end_commands, ignore_signals
from minigpt4.datasets import patience

log = logging.getLogger(__name__)

# Seconds without a batch after which the log says what is waited for; again after twice as long, and so on.
QUIET = 30.0
# A worker hangs if it is at the same file for this many seconds more than `run.data_timeout_s`, or for half of
# `run.timeout_minutes` if other ranks wait.
GRACE = 60.0
# Seconds between two looks at the workers, and at their main process.
LOOK = 1.0
# Most seconds from the end of a worker's connections to its death.
DYING = 2.0
# Bytes of what a worker writes.
SIZE = 512
DEAD = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)")

_statuses: "weakref.WeakSet[WorkerStatus]" = weakref.WeakSet()


class DataWorkerError(OSError):
    """A data worker has died or hung. The text says at what."""


class WorkerStatus:
    """The batch and file that each worker is at, as texts in shared memory."""

    def __init__(self, num_workers: int) -> None:
        self._rows = torch.zeros(num_workers, SIZE, dtype=torch.uint8).share_memory_()
        self._ended = torch.zeros(1, dtype=torch.bool).share_memory_()
        self._owner = os.getpid()

    @property
    def ended(self) -> bool:
        """Whether the workers are to end."""
        return bool(self._ended)

    def end(self) -> None:
        """Ask the workers to end. A copy in another process, forked from the owner, does nothing."""
        if os.getpid() == self._owner:
            self._ended.fill_(True)

    def writer(self, worker: int) -> Callable[[str], None]:
        """A function that writes what a worker is at, for `patience.listen`."""
        row, counter = self._rows[worker].numpy(), count()

        def write(text: str) -> None:
            content = f"{os.getpid()}\n{next(counter)}\n{text}\n".encode("utf-8", "backslashreplace")[:SIZE]
            row[: len(content)] = np.frombuffer(content, np.uint8)

        return write

    def read(self) -> list["Row"]:
        """The rows that were written. One that is written meanwhile may be garbled."""
        rows = []
        for content in self._rows.numpy():
            pid, count, text = (*bytes(content).decode("utf-8", "replace").split("\n"), "", "")[:3]
            if pid.isdigit() and count.isdigit():
                rows.append(Row(int(pid), int(count), text))
        return rows


class Row(NamedTuple):
    """A worker: its process, how often it has written, and what it is at; nothing between two batches."""

    pid: int
    count: int
    text: str


class WatchedLoader:
    """A DataLoader of whole batches whose workers are watched.

    num_workers: with 0, the batches are made in this process, in which a reading that hangs is only logged.
    timeout_s: `run.data_timeout_s`.
    """

    def __init__(self, dataset: Dataset, sampler: Any, num_workers: int, timeout_s: float) -> None:
        self.num_workers, self.limit = num_workers, own_patience(timeout_s + GRACE)
        self.status = WorkerStatus(max(num_workers, 1))
        self.loader = DataLoader(
            dataset,
            sampler=sampler,
            batch_size=None,
            collate_fn=_unchanged,
            num_workers=num_workers,
            worker_init_fn=partial(_start, self.status),
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # by default, each epoch would draw from the global generator
        )
        _statuses.add(self.status)
        # When Python's garbage collector finds this loader, the queues by which torch asks workers to end are closed
        # already: it would wait for each worker in turn, 10 s, because they ignore signals.
        weakref.finalize(self, self.status.end)
        atexit.unregister(end_children)
        atexit.register(end_children)

    def __iter__(self) -> Iterator[Any]:
        watch = _Watch(self.status, self.limit, kill=self.num_workers > 0)
        batches = iter(self.loader)
        try:
            while True:
                if not self.num_workers:
                    patience.listen(self.status.writer(0))
                watch.waiting_since = time.monotonic()
                try:
                    batch = next(batches, watch)
                except (EOFError, OSError) as error:  # the worker may have died while it sent a batch
                    dead = self._dead_workers() if self.num_workers else []
                    raise (_error_of(dead) if dead else error) from None
                watch.waiting_since = None
                if batch is watch:
                    return
                yield batch
        finally:
            watch.ended.set()

    def _dead_workers(self) -> list[Row]:
        """The workers that have died. A process closes its connections a moment before it is dead."""
        deadline = time.monotonic() + DYING
        while True:
            dead = [row for row in self.status.read() if not _is_alive(row.pid)]
            if dead or time.monotonic() > deadline:
                return dead
            time.sleep(0.05)


class _Watch:
    """A thread that looks at the workers while a batch is waited for."""

    def __init__(self, status: WorkerStatus, limit: float, kill: bool) -> None:
        self.waiting_since: float | None = None
        self.ended = threading.Event()
        self._status, self._limit, self._kill = status, limit, kill
        threading.Thread(target=self._run, daemon=True, name="data watch").start()

    def _run(self) -> None:
        seen: dict[int, tuple[Row, float]] = {}
        first_line = next_line = min(QUIET, self._limit / 2)
        while not self.ended.wait(LOOK):
            now, since = time.monotonic(), self.waiting_since
            rows = {row.pid: row for row in self._status.read()}
            seen = {pid: seen[pid] if seen.get(pid, (None,))[0] == row else (row, now) for pid, row in rows.items()}
            if since is None:
                next_line = first_line
                continue
            busy = {row: now - start for row, start in seen.values() if row.text}
            if now - since >= next_line:
                next_line *= 2
                log.warning("Waiting for a batch for %.0f s. %s", now - since, _describe(busy))
            for row, seconds in busy.items():
                if seconds > self._limit and self._kill:
                    log.error("A data worker hangs, and is ended: %s", _describe({row: seconds}))
                    end_commands(row.pid)
                    with suppress(ProcessLookupError):
                        os.kill(row.pid, signal.SIGKILL)


def _describe(busy: dict[Row, float]) -> str:
    at = [f"process {row.pid} is for {seconds:.0f} s at {row.text}" for row, seconds in busy.items()]
    return "; ".join(at) or "No data worker has begun one."


@contextmanager
def name_dead_workers() -> Iterator[None]:
    """Raise DataWorkerError where torch raises RuntimeError because a worker has died.

    It does so in the main thread, wherever that is.
    """
    try:
        yield
    except RuntimeError as error:
        found = DEAD.search(str(error))
        if not found:
            raise
        pids = {int(pid) for pid in found[1].split(",")}
        rows = [row for status in list(_statuses) for row in status.read() if row.pid in pids]
        raise _error_of(rows or [Row(pid, 0, "") for pid in pids]) from None


def _error_of(dead: list[Row]) -> DataWorkerError:
    at = "; ".join(f"process {row.pid}, which was at {row.text or 'no batch'}" for row in dead)
    return DataWorkerError(
        f"A data worker has died: {at}. If the lines above do not say why, memory ran out: lower run.num_workers or "
        "run.batch_size_train. With run.num_workers=0 the main process reads, and shows the error."
    )


def _is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _start(status: WorkerStatus, worker: int) -> None:
    """Set up a worker's process."""
    patience.listen(status.writer(worker))
    ignore_signals()
    _silence_hangups()
    threading.Thread(target=_end_with, args=(os.getppid(), status), daemon=True, name="parent watch").start()


def _end_with(parent: int, status: WorkerStatus) -> None:
    """End this process when its parent or loader has. torch's own check waits for a worker that reads or sends."""
    while os.getppid() == parent and not status.ended:
        time.sleep(LOOK)
    end_commands(os.getpid())
    os._exit(0)


def _silence_hangups() -> None:
    """Let a worker print no traceback for a broken connection: its main process was stopped while it took a batch."""
    default_hook = sys.excepthook

    def excepthook(kind, error, trace):
        cut_short = isinstance(error, OSError) and error.errno is None  # a message, by multiprocessing
        if not (isinstance(error, (ConnectionError, EOFError)) or cut_short):
            default_hook(kind, error, trace)

    # The hook serves multiprocessing's thread that sends batches; errors of a dataset do not pass it.
    sys.excepthook = excepthook


def _unchanged(batch: Any) -> Any:
    return batch
