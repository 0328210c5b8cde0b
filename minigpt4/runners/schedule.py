"""The length of a run in steps, samples and, once the time of a step is measured, hours."""

import logging
import time
from dataclasses import dataclass

from torch import nn

from minigpt4.common.schema import RunConfig
from minigpt4.common.text import pluralize
from minigpt4.common.trained_parts import part_of, rates_of_parts


@dataclass(frozen=True)
class TrainingSchedule:
    """`epochs` of `iters_per_epoch` micro-batches, each of `batch_size` samples on each of `world_size` ranks."""

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
        """Updates of the weights. An incomplete group of micro-batches at the end of an epoch is one, too."""
        return self.epochs * -(-self.iters_per_epoch // self.accum)

    @property
    def samples(self) -> int:
        """Samples of all ranks."""
        return self.batches * self.batch_size * self.world_size

    def duration(self, batch_seconds: float) -> str:
        """The time of all micro-batches, given the seconds of one: "40 s", "12 min", "3.5 hours"."""
        minutes = self.batches * batch_seconds / 60
        if minutes < 1.5:
            return f"{round(60 * minutes)} s"
        return f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{round(minutes)} min"

    def __str__(self) -> str:
        total = self.batch_size * self.world_size * self.accum
        one, several = ("GPU", "GPUs") if self.on_gpu else ("process", "processes")
        accumulated = f", {self.accum} batches a step" if self.accum > 1 else ""
        return (
            f"batch {self.batch_size} per {one}, {total} in total "
            f"({pluralize(self.world_size, one, several)}{accumulated}); "
            f"{pluralize(self.epochs, 'epoch')} of {pluralize(self.iters_per_epoch, 'batch', 'batches')} = "
            f"{pluralize(self.steps, 'step')}, {pluralize(self.samples, 'sample')}"
        )


def log_rates(module: nn.Module, run: RunConfig) -> None:
    """Log for each part that trains: its tensors, parameters, dtypes, learning rates and weight decay."""
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parts.setdefault(part_of(name), []).append(parameter)
    own, lines = rates_of_parts(run), []
    for part, tensors in parts.items():
        rates, dtypes = own.get(part, run), sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        count = sum(tensor.numel() for tensor in tensors)
        lines.append(
            f"  {part:<15}{pluralize(len(tensors), 'tensor'):>13}{count:>16,} parameters  {'+'.join(dtypes):<10} "
            f"rate {rates.init_lr:g} to {rates.min_lr:g}, warm-up {pluralize(rates.warmup_steps, 'step')}, "
            f"decay {rates.weight_decay:g}"
        )
    logging.info("\n".join([f"The parts that train ({run.lr_sched}):", *lines]))


class EtaLogger:
    """Logs the expected duration of a run once, in its first epoch.

    It times the steps between the first two log lines. At a log line the host has waited for the GPU, so the clock
    measures work that is done and not only launched.
    """

    def __init__(self, schedule: TrainingSchedule, log_freq: int):
        self._schedule = schedule
        self._last_step: int | None = min(log_freq + 1, schedule.iters_per_epoch - 1)
        self._start: float | None = None

    def log_schedule(self) -> None:
        """Log the length of the run."""
        text = str(self._schedule)
        logging.info("%s.", text[0].upper() + text[1:])

    def pause(self, seconds: float) -> None:
        """Let seconds not count, such as those of an evaluation."""
        self._start = self._start and self._start + seconds

    def step(self, number: int) -> None:
        """To be called in each step of an epoch; `number` counts from 0."""
        if number == 1:
            self._start = time.perf_counter()
        elif number == self._last_step and self._start is not None:
            seconds = (time.perf_counter() - self._start) / (number - 1)
            duration = self._schedule.duration(seconds)
            logging.info("At %.3f s a batch the run will take %s, without validation.", seconds, duration)
            self._last_step = None  # not in the next epochs
