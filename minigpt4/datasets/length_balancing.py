"""Batches with texts of about the same length in sum. Ranks wait for the one with most tokens in every step.

Lengths are in characters, which tokens go by. What `max_txt_len` cuts off a text is pluralize, too.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

# Samples of a stream that are dealt out at a time, to batches that follow each other.
POOL = 128


def deal(lengths: Sequence[int], hands: int) -> list[list[int]]:
    """Indices of `lengths` in `hands` lists of the same size, whose sums are about equal; each list is in order."""
    size = len(lengths) // hands
    dealt: list[list[int]] = [[] for _ in range(hands)]
    sums = [0] * hands
    for index in sorted(range(size * hands), key=lambda i: -lengths[i]):
        hand = min((h for h in range(hands) if len(dealt[h]) < size), key=sums.__getitem__)
        dealt[hand].append(index)
        sums[hand] += lengths[index]
    return [sorted(hand) for hand in dealt]


def balanced_batches(samples: Iterable[Any], batch_size: int, pool: int = POOL) -> Iterator[list[Any]]:
    """Batches of an endless stream of samples with "text_input", as many dealt out at a time as go into `pool`, or one.

    The next ones are drawn as these leave, a batch at a time: drawn all at once, they would keep everybody waiting.
    """
    samples, count = iter(samples), max(pool // batch_size, 1)
    upcoming = list(islice(samples, count * batch_size))
    while True:
        hands = [[upcoming[i] for i in hand] for hand in deal([text_length(sample) for sample in upcoming], count)]
        upcoming = []
        while hands:
            yield hands.pop(0)
            upcoming += islice(samples, batch_size)


def rank_share(items: list[Any], length_of: Callable[[Any], int] | None, rank: int, ranks: int) -> list[Any]:
    """A rank's part of what all ranks take in a step, dealt out by the lengths of the texts where these are known."""
    if ranks == 1 or length_of is None:
        return items[rank::ranks]
    return [items[i] for i in deal([length_of(item) for item in items], ranks)[rank]]


def text_length(sample: Any) -> int:
    """Characters of a sample's text, which tokens go by; 0 where it has none."""
    text = sample.get("text_input") if isinstance(sample, dict) else None
    return len(text) if isinstance(text, str) else 0
