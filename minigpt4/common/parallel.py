"""Items that are read ahead of time, answered in batches, and written down."""

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import islice
from typing import Any

from tqdm import tqdm

from minigpt4.common.resumable import Output
from minigpt4.common.text import pluralize


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


def answer_in_batches(
    items: Iterable, load: Callable[[Any], tuple[Any, Any]], answer: Callable[[list[tuple]], list[dict]], size: int
) -> Iterator[tuple[int, list[dict], list[str]]]:
    """For each batch of items: their number, the lines of the answers, and why items were skipped.

    Args:
        load: reads an item, in a thread: its name, and what was read, or an exception.
        answer: the lines for a batch of what `load` returned, without exceptions.
    """
    with ThreadPoolExecutor(4) as pool:
        for batch in batches_ahead(pool, load, items, size):
            good = [pair for pair in batch if not isinstance(pair[1], Exception)]
            skipped = [f"{name}: {error}" for name, error in batch if isinstance(error, Exception)]
            yield len(batch), answer(good) if good else [], skipped


def write_answers(
    items: Iterable,
    load: Callable[[Any], tuple[Any, Any]],
    answer: Callable[[list[tuple]], list[dict]],
    output: Output,
    batch_size: int,
    unit: str,
    total: int | None,
) -> list[str]:
    """Answer this rank's items in batches, and write a line for each. Returns why all ranks skipped items.

    Args:
        load, answer: as for `answer_in_batches`.
        unit: what a line is, for messages.
        total: number of the items, if it is known.
    """
    from minigpt4.common import dist_utils

    skipped, written = [], 0
    with tqdm(total=total, unit=unit, disable=dist_utils.get_rank() > 0) as bar:
        for size, lines, reasons in answer_in_batches(items, load, answer, batch_size):
            if lines:
                output.write(lines)
            written += len(lines)
            skipped += reasons
            bar.update(size)
    output.finish()
    skipped = [line for lines in dist_utils.gather_objects(skipped) for line in lines]
    if skipped:
        logging.warning("Skipped, %d in all:\n  %s", len(skipped), "\n  ".join(skipped))
    written = sum(dist_utils.gather_objects(written))
    logging.info("%s written; %d were there already.", pluralize(written, unit), len(output.done))
    return skipped
