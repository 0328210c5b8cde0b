"""Runs a function over many items in worker processes."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from minigpt4.common.errors import ConfigError

_function: Callable[[Any], Any] | None = None
"""Of a worker process. It gets it once, not with each item: it may hold a whole dataset."""


def available_cpus() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(function: Callable[[Any], Any], items: Sequence[Any], workers: int) -> Iterator[Any]:
    """`map(function, items)`, in order, in so many processes; in this one if a single process is enough.

    Raises ConfigError if a process is killed.
    """
    workers = min(workers, len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(workers, initializer=_start, initargs=(function,))
    try:
        yield from pool.map(_call, items)
    except BrokenProcessPool:
        raise ConfigError(
            f"--workers {workers}: a worker process was killed, perhaps because the memory is full. Try fewer."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers


def _call(item: Any) -> Any:
    return _function(item)
