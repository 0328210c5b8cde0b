"""An iterator that processes items ahead of time and groups the results."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from itertools import islice


def batches_ahead(pool: Executor, function: Callable, items: Iterable, size: int) -> Iterator[list]:
    """`map(function, items)` in lists of `size`; the last may be shorter. The pool computes two lists ahead."""
    items = iter(items)
    running = [pool.submit(function, item) for item in islice(items, 2 * size)]
    while running:
        batch = []
        while running and len(batch) < size:
            batch.append(running.pop(0).result())
            running += [pool.submit(function, item) for item in islice(items, 1)]
        yield batch
