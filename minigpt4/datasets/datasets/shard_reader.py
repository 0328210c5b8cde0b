"""Reads a stream's samples in random order, from any position on."""

import random
from collections.abc import Iterator
from itertools import chain, count, islice
from typing import Any, Protocol

import webdataset as wds

from minigpt4.common.errors import ConfigError
from minigpt4.datasets.samples import Sample
from minigpt4.datasets.seeding import derive_seed

Position = tuple[int, int, list[int]]
"""Samples taken from the shuffle buffer; samples skipped at the start; for each shard drawn, samples read of it."""


class Source(Protocol):
    """The stream that a reader reads."""

    shards: list[str]
    shuffle_buffer: int

    def raw_samples(self, shards: Iterator[str]) -> Iterator[Any]:
        """The undecoded samples of shards, in order, with the attribute `shard`."""

    def samples_of(self, shard: str) -> Iterator[Any]:
        """The samples of one shard."""

    def size_of(self, shard: str) -> int:
        """Bytes of a shard; 0 if they are not known."""

    def item(self, sample: Any) -> dict[str, Any] | None:
        """The decoded sample; None for one that is left out."""


class ShardReader:
    """An endless iterator over items. Shards are drawn with replacement; samples pass a shuffle buffer undecoded.

    It starts at a random place in its first shard. The order is a function of the seed and of the numbers of samples in
    the shards. So at a `position`, which holds these numbers, only the shards are read whose samples are in the buffer.
    """

    def __init__(self, source: Source, seed: int, position: Position | None = None) -> None:
        self._source, self._rng = source, random.Random(seed)
        self._taken, self._skipped = 0, 0
        self._counts: list[int] = []  # of the last shard, those read so far
        self._buffer: dict[int, Any] = {}  # undecoded samples by number
        self._raw: Iterator[Any] | None = None
        size = source.shuffle_buffer
        # We draw shards and seeds ourselves: webdataset's depend on time and process id, or collide.
        self._order = wds.shuffle(size, initial=size, seed=derive_seed(seed, "shuffle"))(self._numbers())
        if position is None:
            self._raw = self._start_anywhere(self._count(source.raw_samples(self._draw())))
        else:
            self._go_to(*position)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        while True:
            number = next(self._order)
            self._taken += 1
            raw = self._buffer.pop(number)
            item = self._source.item(raw)
            if item is not None:
                return Sample(item, raw.shard)

    def position(self) -> Position:
        """The position behind the last item."""
        return self._taken, self._skipped, [*self._counts]

    def _numbers(self) -> Iterator[int]:
        """0, 1, 2 … Each sample is read into the buffer with its number, unless the reader goes to a position."""
        for number in count():
            self._buffer[number] = next(self._raw) if self._raw else None
            yield number

    def _draw(self) -> Iterator[str]:
        while True:
            shard = self._rng.choice(self._source.shards)
            self._counts.append(0)
            yield shard

    def _count(self, samples: Iterator[Any]) -> Iterator[Any]:
        for sample in samples:
            self._counts[-1] += 1
            yield sample

    def _start_anywhere(self, samples: Iterator[Any]) -> Iterator[Any]:
        """Skip a random part of the first shard, so that each place in it is equally likely to be the start."""
        first = next(samples)
        bytes_to_skip = self._rng.random() * self._source.size_of(first.shard)
        for sample in chain([first], samples):
            if bytes_to_skip > 0 and sample.shard == first.shard:
                bytes_to_skip -= sample.size
                self._skipped += 1
            else:
                bytes_to_skip = 0
                yield sample

    def _go_to(self, taken: int, skipped: int, counts: list[int]) -> None:
        """Raises ConfigError for a shard that has fewer samples than it had."""
        for number in islice(self._order, taken):
            del self._buffer[number]
        self._taken, self._skipped = taken, skipped
        wanted, end, started, draws = {number + skipped for number in self._buffer}, 0, False, self._draw()
        for number_read in counts:
            shard, start, end = next(draws), end, end + number_read
            self._counts[-1] = number_read
            if number_read and not started:
                self._rng.random()  # drawn by `_start_anywhere`
                started = True
            is_last = len(self._counts) == len(counts)
            if is_last or not wanted.isdisjoint(range(start, end)):
                samples = self._source.samples_of(shard)
                for number in range(start, end):
                    try:
                        sample = next(samples)
                    except StopIteration:
                        raise ConfigError(
                            f"{shard} has {number - start} samples that can be used. In the run that is resumed it had "
                            f"{number_read} or more, so the run cannot go on exactly. Restore the shard."
                        ) from None
                    if number in wanted:
                        self._buffer[number - skipped] = sample
        self._raw = self._count(chain(samples, self._source.raw_samples(draws)))
