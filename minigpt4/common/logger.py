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
from typing import Any

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


class MetricLogger:
    """Running averages of an epoch, and its progress lines.

    Values may be tensors on a GPU. They are summed there and read only for a log line, because each read makes the host
    wait for the GPU.

    on_line: is called for each line with the number of the item and the line's values, not rounded: the latest ones,
        `step_seconds` and `data_seconds`, `…_per_second` of each amount, and the memory in MiB.
    """

    def __init__(self, on_line: Callable[[int, dict[str, float]], None] = lambda item, values: None) -> None:
        self._on_line = on_line
        self._latest: dict[str, float | torch.Tensor] = {}
        self._total: dict[str, float | torch.Tensor] = {}
        self._amounts: dict[str, int] = {}  # since the last line
        self._count = 0
        self._paused = 0.0  # seconds since the last item

    def pause(self, seconds: float) -> None:
        """Let seconds since the last item not count, such as those of an evaluation."""
        self._paused += seconds

    def update(self, **values: float | torch.Tensor) -> None:
        """Record one step's values; the same names in every step."""
        for name, value in values.items():
            self._latest[name] = value
            self._total[name] = self._total.get(name, 0.0) + value
        self._count += 1

    def count(self, **amounts: int) -> None:
        """Add to amounts of which a line tells how many there were a second, such as images."""
        for name, amount in amounts.items():
            self._amounts[name] = self._amounts.get(name, 0) + amount

    def global_avg(self) -> dict[str, float]:
        """The mean of each value over the steps of all ranks."""
        sums = torch.tensor([*(float(total) for total in self._total.values()), self._count], dtype=torch.float64)
        *totals, count = all_reduce_sum(sums).tolist()
        return {name: total / max(count, 1) for name, total in zip(self._total, totals, strict=True)}

    def state(self) -> dict[str, Any]:
        """The sums so far, for `load_state`."""
        return {"totals": dict(self._total), "count": self._count}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from sums, which may be on another device."""
        self._total, self._count = dict(state["totals"]), state["count"]

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
            if line_within(i, 1, length, log_freq):
                latest = {name: float(value) for name, value in self._latest.items()}
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
                _check_finite(latest, f"{header} step {i}")
            item_end = time.perf_counter()
        total = time.perf_counter() - start
        logging.info("%s Total time: %s (%.4f s / it)", header, _hms(total), total / max(length - first, 1))


def line_within(item: int, count: int, length: int, log_freq: int) -> bool:
    """Whether `log_every` logs a line at one of the `count` items from `item` on."""
    return -item % log_freq < count or item + count >= length


def _check_finite(values: dict[str, float], where: str) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{where}: {name} is {value}. The run stops; what was saved before is untouched. Lower run.init_lr, or "
                "check the weights that were loaded; with fp16, try run.amp_dtype=bf16."
            )


def _hms(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))


def _memory() -> dict[str, int]:
    """In MiB: this process's memory, and the peak of what torch has allocated on its GPU."""
    memory = {"host_memory_mib": psutil.Process().memory_info().rss // 2**20}
    if torch.cuda.is_initialized():
        memory["gpu_memory_mib"] = torch.cuda.max_memory_allocated() // 2**20
    return memory
