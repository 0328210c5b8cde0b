"""Iterators that process items ahead of time and group them into batches."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from itertools import islice


def ahead(pool: Executor, function: Callable, items: Iterable, depth: int) -> Iterator:
    """`map(function, items)`. The pool computes up to `depth` results before they are asked for."""
    items = iter(items)
    running = [pool.submit(function, item) for item in islice(items, depth)]
    while running:
        result = running.pop(0).result()
        running += [pool.submit(function, item) for item in islice(items, 1)]
        yield result


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items; the last may be shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
