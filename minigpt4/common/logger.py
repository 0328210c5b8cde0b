"""Logging of a run: set-up, and the progress lines of an epoch."""

import datetime
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator

import torch

from minigpt4.common import first_release
from minigpt4.common.dist_utils import all_reduce_sum

__getattr__ = first_release.attributes_of(__name__)  # for names that are gone

# Decimals in progress lines, of values that are not shown with four.
DIGITS = {"lr": 6}


def setup_logger() -> None:
    """Rank 0 logs from INFO up, the others from WARNING up, in the tutorial's format.

    The rank is torchrun's, so this can be called before there is a process group.
    """
    logging.basicConfig(format="%(asctime)s [%(levelname)s] %(message)s")
    logging.getLogger().setLevel(logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.WARNING)
    logging.captureWarnings(True)


class MetricLogger:
    """Running averages of an epoch, and its progress lines.

    Values may be tensors on a GPU. They are summed there and read only for a log line, because each read makes the host
    wait for the GPU.
    """

    def __init__(self) -> None:
        self._latest: dict[str, float | torch.Tensor] = {}
        self._total: dict[str, float | torch.Tensor] = {}
        self._count = 0

    def update(self, **values: float | torch.Tensor) -> None:
        """Record one step's values; the same names in every step."""
        for name, value in values.items():
            self._latest[name] = value
            self._total[name] = self._total.get(name, 0.0) + value
        self._count += 1

    def global_avg(self) -> dict[str, float]:
        """The mean of each value over the steps of all ranks."""
        sums = torch.tensor([*(float(total) for total in self._total.values()), self._count], dtype=torch.float64)
        *totals, count = all_reduce_sum(sums).tolist()
        return {name: total / max(count, 1) for name, total in zip(self._total, totals, strict=True)}

    def log_every(self, iterable: Iterable, length: int, log_freq: int, header: str) -> Iterator:
        """Yield from `iterable`; log a line every `log_freq` items and at the last of the `length`.

        `time` and `data` are seconds per item since the previous line: in total, and waiting for data.
        """
        width = len(str(length))
        start = last_line = item_end = time.perf_counter()
        data_time, last_logged = 0.0, -1
        for i, item in enumerate(iterable):
            data_time += time.perf_counter() - item_end
            yield item
            if i % log_freq == 0 or i == length - 1:
                latest = {name: float(value) for name, value in self._latest.items()}
                values = [f"{name}: {value:.{DIGITS.get(name, 4)}f}" for name, value in latest.items()]
                now, items = time.perf_counter(), i - last_logged
                eta = _hms((now - start) / (i + 1) * (length - i - 1))
                times = [f"time: {(now - last_line) / items:.4f}", f"data: {data_time / items:.4f}", *_max_memory()]
                logging.info("  ".join([f"{header}  [{i:{width}d}/{length}]  eta: {eta}", *values, *times]))
                last_line, data_time, last_logged = now, 0.0, i
                _check_finite(latest, f"{header} step {i}")
            item_end = time.perf_counter()
        total = time.perf_counter() - start
        logging.info("%s Total time: %s (%.4f s / it)", header, _hms(total), total / max(length, 1))


def _check_finite(values: dict[str, float], where: str) -> None:
    for name, value in values.items():
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{where}: {name} is {value}. The run stops; what was saved before is untouched. Lower run.init_lr, or "
                "check the weights that were loaded; with fp16, try run.amp_dtype=bf16."
            )


def _hms(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))


def _max_memory() -> list[str]:
    """The peak of the memory that torch has allocated on this rank's GPU, in MiB."""
    if not torch.cuda.is_initialized():
        return []
    return [f"max mem: {torch.cuda.max_memory_allocated() // 2**20}"]
