"""How long a run is: batches, steps, samples at the start, its time as soon as that of a step is known."""

import logging
import time
from dataclasses import dataclass

from minigpt4.common.text import pluralize


@dataclass(frozen=True)
class TrainingSchedule:
    """Batches of `batch_size` on each of `world_size` ranks, `iters_per_epoch` in each of `epochs`."""

    batch_size: int
    world_size: int
    iters_per_epoch: int
    epochs: int
    accum: int = 1
    on_gpu: bool = True

    @property
    def batches(self) -> int:
        """Micro-batches of each rank."""
        return self.epochs * self.iters_per_epoch

    @property
    def steps(self) -> int:
        """Updates; what is left at an epoch's end is one too."""
        return self.epochs * -(-self.iters_per_epoch // self.accum)

    @property
    def samples(self) -> int:
        return self.batches * self.batch_size * self.world_size

    def duration(self, batch_seconds: float) -> str:
        """With so many seconds for each micro-batch: "40 s", "12 min", "3.5 hours"."""
        minutes = self.batches * batch_seconds / 60
        if minutes < 1.5:
            return f"{round(60 * minutes)} s"
        return f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{round(minutes)} min"

    def __str__(self) -> str:
        total = self.batch_size * self.world_size * self.accum
        each, several = ("GPU", "GPUs") if self.on_gpu else ("process", "processes")
        accumulated = f", {self.accum} batches a step" if self.accum > 1 else ""
        return (
            f"batch {self.batch_size} per {each}, {total} in total "
            f"({pluralize(self.world_size, each, several)}{accumulated}); "
            f"{pluralize(self.epochs, 'epoch')} of {pluralize(self.iters_per_epoch, 'batch', 'batches')} = "
            f"{pluralize(self.steps, 'step')}, {pluralize(self.samples, 'sample')}"
        )


class EtaLogger:
    """Times the steps between the first two log lines, where the host has waited for the GPU."""

    def __init__(self, length: TrainingSchedule, log_freq: int):
        self._length = length
        self._last = min(log_freq + 1, length.iters_per_epoch - 1)
        self._start: float | None = None
        self._told = False

    def announce(self) -> None:
        text = str(self._length)
        logging.info("%s.", text[0].upper() + text[1:])

    def step(self, number: int) -> None:
        """To be called in each step of an epoch, pluralize from 0."""
        if self._told:
            return
        if number == 1:
            self._start = time.perf_counter()
        elif number == self._last and self._start is not None:
            seconds = (time.perf_counter() - self._start) / (number - 1)
            duration = self._length.duration(seconds)
            logging.info("At %.3f s a batch the run will take %s, without validation.", seconds, duration)
            self._told = True
