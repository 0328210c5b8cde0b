"""Length balancing: batches whose texts have about the same total length. In each step ranks wait for the longest one.

Lengths are in characters, to which the number of tokens is about proportional. Text that `max_txt_len` cuts off counts
too.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

# Samples of a stream that are distributed at a time over the batches that follow.
POOL = 128


def balanced_bins(lengths: Sequence[int], num_bins: int) -> list[list[int]]:
    """Indices of `lengths` in `num_bins` lists of the same size whose sums are about equal; each list is in order.

    The longest go first, each into the bin with the smallest sum that has room (a greedy heuristic).
    """
    size = len(lengths) // num_bins
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    sums = [0] * num_bins
    for index in sorted(range(size * num_bins), key=lambda i: -lengths[i]):
        with_room = [number for number in range(num_bins) if len(bins[number]) < size]
        smallest = min(with_room, key=sums.__getitem__)
        bins[smallest].append(index)
        sums[smallest] += lengths[index]
    return [sorted(indices) for indices in bins]


def batches_per_pool(batch_size: int, pool: int) -> int:
    """The number of batches of a pool of at most `pool` samples, or of one batch."""
    return max(pool // batch_size, 1)


def balanced_batches(
    samples: Iterable[Any], batch_size: int, pool: int = POOL, resumed: bool = False
) -> Iterator[list[Any]]:
    """Batches of an endless stream of samples, balanced within pools of at most `pool` samples, or one batch.

    The next pool is drawn one batch at a time while the current one is used: drawn at once, it would delay a step.

    resumed: the samples go on after the first batch of a pool. Empty batches stand for those of that pool.
    """
    samples, count = iter(samples), batches_per_pool(batch_size, pool)
    batches: list[list[Any]] = [[]] * count if resumed else []
    upcoming = [] if resumed else list(islice(samples, count * batch_size))
    while True:
        if not batches:
            bins = balanced_bins([text_length(sample) for sample in upcoming], count)
            batches = [[upcoming[i] for i in indices] for indices in bins]
            upcoming = []
        yield batches.pop(0)
        upcoming += islice(samples, batch_size)


def rank_share(items: list[Any], length_of: Callable[[Any], int] | None, rank: int, ranks: int) -> list[Any]:
    """A rank's part of the items that all ranks take in a step, balanced by length if `length_of` is given."""
    if ranks == 1 or length_of is None:
        return items[rank::ranks]
    return [items[i] for i in balanced_bins([length_of(item) for item in items], ranks)[rank]]


def text_length(sample: Any) -> int:
    """Characters of a sample's text; 0 if it has none."""
    text = sample.get("text_input") if isinstance(sample, dict) else None
    return len(text) if isinstance(text, str) else 0
