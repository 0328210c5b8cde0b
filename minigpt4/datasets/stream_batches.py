"""The batches of a stream in an epoch, from any of them on."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset

from minigpt4.common.errors import ConfigError
from minigpt4.datasets.left_out import Tally
from minigpt4.datasets.length_balancing import balanced_batches, batches_per_pool
from minigpt4.datasets.samples import usable_samples

Restart = tuple[Any, list[int]]
"""A position of a reader, and the numbers of the batches that are made again from there, the first one empty.

Without a position they are all batches so far.
"""


class StreamBatches:
    """The batches that one worker makes of a stream in an epoch, as lists of samples.

    To go on after a batch it is not enough to know how far the stream was read: some samples wait in pools
    (`length_balancing`). So the last batches are made again, each under its own seed. A stream without the method
    `reader` is read again from its start.

    Args:
        reader: number of the worker. It matters to streams with `reader` only.
        seeded_for: the context in which a batch, given by number, is made again.
        restart: of earlier `StreamBatches` of the same epoch.
    """

    def __init__(
        self,
        dataset: IterableDataset,
        tally: Tally,
        batch_size: int,
        pool: int,
        reader: int,
        seeded_for: Callable[[int], AbstractContextManager],
        restart: Restart | None,
    ) -> None:
        self._per_pool = batches_per_pool(batch_size, pool)
        self._position: Callable[[], Any] | None = None
        position, numbers = restart or (None, [])
        if hasattr(dataset, "reader"):
            samples = dataset.reader(reader, position)
            self._position = samples.position
        else:
            samples = _endless(dataset, tally.name)
        self._batches = balanced_batches(usable_samples(samples, tally), batch_size, pool, position is not None)
        self._made: list[tuple[int, Any]] = []  # batches with the positions after them
        for number in numbers:
            with seeded_for(number):
                self.make(number)

    def make(self, number: int) -> list[Any]:
        """The samples of the next batch, whose number in the epoch this is."""
        samples = next(self._batches)
        begins_pool = len(self._made) % self._per_pool == 0
        self._made.append((number, self._position() if self._position and begins_pool else None))
        if self._position and len(self._made) == 2 * self._per_pool:
            # The next batch is the first of a pool, whose samples were read after the first one here was made.
            del self._made[: self._per_pool]
        return samples

    def restart(self) -> Restart:
        """From where the batches after the last one can be made."""
        numbers = [number for number, _ in self._made]
        return (self._made[0][1] if len(numbers) >= self._per_pool else None), numbers


def _endless(dataset: IterableDataset, name: str) -> Iterator[Any]:
    """The samples of a stream; one that ends is begun again. Raises ConfigError for one without samples."""
    while True:
        samples = iter(dataset)
        first = list(islice(samples, 1))
        if not first:
            raise ConfigError(f"{name} is a stream without any sample.")
        yield from first
        yield from samples
