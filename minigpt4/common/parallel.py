"""Items that are read ahead of time, answered in batches, and written down."""

import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

from tqdm import tqdm

from minigpt4.common.resumable import Output
from minigpt4.common.text import pluralize

THREADS = 4  # that read items ahead
LISTED = 20  # causes in the log; a file has all


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


class Batch(NamedTuple):
    """How many items were taken, the lines of their answers, and {name: cause} of those that were skipped."""

    size: int
    lines: list[dict]
    skipped: dict[str, str]


def answer_in_batches(
    items: Iterable,
    load: Callable[[Any], tuple[Any, Any]],
    answer: Callable[[list[tuple]], list[dict]],
    size: int,
    threads: int = THREADS,
) -> Iterator[Batch]:
    """Answer items, `size` at a time.

    Args:
        load: reads an item, in a thread: its name, and what was read, or an exception.
        answer: the lines for a batch of what `load` returned, without exceptions.
    """
    with ThreadPoolExecutor(threads) as pool:
        for batch in batches_ahead(pool, load, items, size):
            good = [pair for pair in batch if not isinstance(pair[1], Exception)]
            skipped = {str(name): str(error) for name, error in batch if isinstance(error, Exception)}
            yield Batch(len(batch), answer(good) if good else [], skipped)


def write_answers(batches: Iterable[Batch], output: Output, unit: str, total: int | None) -> list[str]:
    """Write the lines of this rank's answers. Returns why all ranks skipped items; a file beside `output` has it, too.

    Args:
        unit: what a line is, for messages.
        total: number of the items, if it is known.
    """
    from minigpt4.common import dist_utils

    own, written = {}, 0
    with tqdm(total=total, unit=unit, disable=dist_utils.get_rank() > 0) as bar:
        for batch in batches:
            if batch.lines:
                output.write(batch.lines)
            written += len(batch.lines)
            own |= batch.skipped
            bar.update(batch.size)
    output.finish()
    skipped = {name: cause for each in dist_utils.gather_objects(own) for name, cause in each.items()}
    file = dist_utils.from_main(lambda: output.write_errors(skipped))
    reasons = [f"{name}: {cause}" for name, cause in skipped.items()]
    if reasons:
        listed = [*reasons[:LISTED], f"… All are in {file}."] if file and len(reasons) > LISTED else reasons
        logging.warning("Skipped, %d in all:\n  %s", len(reasons), "\n  ".join(listed))
    written = sum(dist_utils.gather_objects(written))
    logging.info("%s written; %d were there already.", pluralize(written, unit), len(output.done))
    return reasons
