"""Logging of a run: set-up, and the progress lines of an epoch."""

import contextlib
import datetime
import io
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from logging.handlers import MemoryHandler
from pathlib import Path

import psutil
import torch

from minigpt4.common import first_release
from minigpt4.common.dist_utils import all_reduce_sum

__getattr__ = first_release.attributes_of(__name__)  # for names that are gone

# Decimals in progress lines, of values that are not shown with four.
DIGITS = {"lr": 6}


FORMAT = "%(asctime)s [%(levelname)s] %(message)s"


def setup_logger() -> None:
    """Rank 0 logs from INFO up, the others from WARNING up, in the tutorial's format.

    The rank is torchrun's, so this can be called before there is a process group.
    """
    logging.basicConfig(format=FORMAT)
    logging.getLogger().setLevel(logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.WARNING)
    logging.captureWarnings(True)


class _ConsoleFile(logging.FileHandler):
    """The log in a file. If it cannot be written, the run goes on, and the first time there is a warning."""

    warned = False

    def _open(self) -> io.TextIOWrapper:
        # Without a buffer: it would keep a line that failed, and fail again when the file is closed.
        return io.TextIOWrapper(open(self.baseFilename, "ab", 0), self.encoding, self.errors, write_through=True)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.warned:
            self.warned = True
            logging.warning("Lines of %s are missing; the run goes on. %s", self.baseFilename, error)


@contextlib.contextmanager
def kept_console() -> Iterator[Callable[[Path], None]]:
    """While entered, what is logged is kept, also the traceback of an exception that ends this.

    Yields a function that names the file for it. Until it is called everything is kept in memory.
    """
    root, memory, files = logging.getLogger(), MemoryHandler(1, flushLevel=logging.CRITICAL + 1), []

    def write_to(path: Path) -> None:
        try:
            file = _ConsoleFile(path, encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            logging.warning("The log on the screen is not kept; the run goes on. %s", error)
            return
        file.setFormatter(logging.Formatter(FORMAT))
        memory.setTarget(file)
        memory.flush()
        root.removeHandler(memory)
        root.addHandler(file)
        files.append(file)

    root.addHandler(memory)
    try:
        yield write_to
    except BaseException:
        for file in files:
            with contextlib.suppress(OSError):
                file.stream.write(traceback.format_exc())
        raise
    finally:
        for handler in (memory, *files):
            root.removeHandler(handler)
            handler.close()


Totals = dict[str, tuple[float, int]]
"""The sum of the finite values of each name, and their number."""


class MetricLogger:
    """Running averages of an epoch, and its progress lines.

    Values may be tensors on a GPU. They are read only for a log line, because each read makes the host wait for the
    GPU.

    on_line: is called for each line with the number of the item and the line's values, not rounded: the latest ones,
        `step_seconds` and `data_seconds`, `…_per_second` of each amount, and the memory in MiB.
    """

    def __init__(self, on_line: Callable[[int, dict[str, float]], None] = lambda item, values: None) -> None:
        self._on_line = on_line
        self._unread: dict[str, list[float | torch.Tensor]] = {}  # since the last line
        self._totals: Totals = {}
        self._amounts: dict[str, int] = {}  # since the last line
        self._paused = 0.0  # seconds since the last item

    def pause(self, seconds: float) -> None:
        """Let seconds since the last item not count, such as those of an evaluation."""
        self._paused += seconds

    def update(self, **values: float | torch.Tensor) -> None:
        """Record one step's values; the same names in every step."""
        for name, value in values.items():
            self._unread.setdefault(name, []).append(value)

    def count(self, **amounts: int) -> None:
        """Add to amounts, such as images. A line shows how many there were in a second."""
        for name, amount in amounts.items():
            self._amounts[name] = self._amounts.get(name, 0) + amount

    def global_avg(self) -> dict[str, float]:
        """The mean of each value over the steps of all ranks. Values that are not finite are left out."""
        self._read()
        sums = all_reduce_sum(torch.tensor([*self._totals.values()], dtype=torch.float64)).tolist()
        return {name: total / max(count, 1) for name, (total, count) in zip(self._totals, sums, strict=True)}

    def state(self) -> Callable[[], Totals]:
        """A function that returns the sums up to now. It waits for the GPU; this method does not."""
        totals, unread = dict(self._totals), {name: list(values) for name, values in self._unread.items()}
        return lambda: _added(totals, _values(unread))

    def add_totals(self, totals: Totals) -> None:
        """Add sums of the part of the epoch before."""
        for name, (total, number) in totals.items():
            before = self._totals.get(name, (0.0, 0))
            self._totals[name] = before[0] + total, before[1] + number

    def _read(self) -> dict[str, float]:
        """Wait for the values, and add them up. Returns the latest ones."""
        values = _values(self._unread)
        self._totals = _added(self._totals, values)
        self._unread.clear()
        return {name: of_name[-1] for name, of_name in values.items()}

    def log_every(self, iterable: Iterable, length: int, log_freq: int, header: str, first: int = 0) -> Iterator:
        """Yield from `iterable`; log a line every `log_freq` items and at the last of the `length`.

        first: the number of the first item.

        `time` and `data` are seconds per item since the previous line: in total, and waiting for data.
        """
        width = len(str(length))
        start = last_line = item_end = time.perf_counter()
        data_time, last_logged = 0.0, first - 1
        for i, item in enumerate(iterable, first):
            data_time += time.perf_counter() - item_end
            yield item
            start, last_line, self._paused = start + self._paused, last_line + self._paused, 0.0
            if i % log_freq == 0 or i + 1 == length:
                latest = self._read()
                values = [f"{name}: {value:.{DIGITS.get(name, 4)}f}" for name, value in latest.items()]
                now, items, memory = time.perf_counter(), i - last_logged, _memory()
                eta = _hms((now - start) / (i + 1 - first) * (length - i - 1))
                step_time, data_time = (now - last_line) / items, data_time / items
                times = [f"time: {step_time:.4f}", f"data: {data_time:.4f}"]
                times += [f"max mem: {memory['gpu_memory_mib']}"] if "gpu_memory_mib" in memory else []
                logging.info("  ".join([f"{header}  [{i:{width}d}/{length}]  eta: {eta}", *values, *times]))
                rates = {f"{name}_per_second": amount / (now - last_line) for name, amount in self._amounts.items()}
                self._on_line(i, {**latest, "step_seconds": step_time, "data_seconds": data_time, **rates, **memory})
                self._amounts.clear()
                last_line, data_time, last_logged = now, 0.0, i
            item_end = time.perf_counter()
        total = time.perf_counter() - start
        logging.info("%s Total time: %s (%.4f s / it)", header, _hms(total), total / max(length - first, 1))


def _values(unread: Mapping[str, list[float | torch.Tensor]]) -> dict[str, list[float]]:
    return {
        name: torch.stack(values).flatten().tolist() if isinstance(values[0], torch.Tensor) else values
        for name, values in unread.items()
    }


def _added(totals: Totals, values: Mapping[str, list[float]]) -> Totals:
    """The sums with more values. These are added one by one, so that the sums do not depend on when they are read."""
    added = dict(totals)
    for name, of_name in values.items():
        total, number = added.get(name, (0.0, 0))
        for value in of_name:
            if math.isfinite(value):
                total, number = total + value, number + 1
        added[name] = total, number
    return added


def _hms(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))


def _memory() -> dict[str, int]:
    """In MiB: this process's memory, and the peak of what torch has allocated on its GPU."""
    memory = {"host_memory_mib": psutil.Process().memory_info().rss // 2**20}
    if torch.cuda.is_initialized():
        memory["gpu_memory_mib"] = torch.cuda.max_memory_allocated() // 2**20
    return memory
