"""What a run says of its length: batches, steps, samples at the start, its time as soon as that of a step is known."""

import logging
import time

from minigpt4.common.length import RunLength


class Pace:
    """Times the steps between the first two log lines, where the host has waited for the GPU."""

    def __init__(self, length: RunLength, log_freq: int):
        self._length = length
        self._last = min(log_freq + 1, length.iters_per_epoch - 1)
        self._start: float | None = None
        self._told = False

    def announce(self) -> None:
        text = str(self._length)
        logging.info("%s.", text[0].upper() + text[1:])

    def step(self, number: int) -> None:
        """To be called in each step of an epoch, counted from 0."""
        if self._told:
            return
        if number == 1:
            self._start = time.perf_counter()
        elif number == self._last and self._start is not None:
            seconds = (time.perf_counter() - self._start) / (number - 1)
            duration = self._length.duration(seconds)
            logging.info("At %.3f s a batch the run will take %s, without validation.", seconds, duration)
            self._told = True
