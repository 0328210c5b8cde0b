"""The folder of a run."""

import json
import logging
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from minigpt4.common import dist_utils
from minigpt4.runners.checkpoints import BEST
from minigpt4.runners.health import BAD_BATCHES
from minigpt4.tracking import metrics
from minigpt4.tracking.record import PICTURES
from minigpt4.weights import checkpoint


@contextmanager
def reserved_folder(output_dir: str) -> Iterator[str]:
    """Make a folder for a run in `output_dir`, and yield its name (the job id), the same on every rank.

    The name is the time in seconds. A run that finds it taken gets a suffix, as in 20261130091500-2: making a folder is
    atomic, so runs that start together never share one. Folders into which nothing was written are removed at the end.
    """
    now = datetime.now().strftime("%Y%m%d%H%M%S")
    made = dist_utils.from_main(lambda: _make_folder(folder_of(output_dir, now)))
    try:
        yield made[0].name
    finally:
        with suppress(OSError):  # one is not empty
            for folder in made if dist_utils.is_main_process() else ():
                folder.rmdir()


def folder_of(output_dir: str, job_id: str) -> Path:
    """The folder of a run."""
    return Path(output_dir).expanduser() / job_id


def new_run_id(job_id: str) -> str:
    """A name for a run that no other has, on any machine."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', job_id)}-{secrets.token_hex(3)}"


def start_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Make the folder of a run with log.txt, which begins with all settings.

    Raises FileExistsError if it holds something.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds another run. Start again, with another job id.")
    (folder / "result").mkdir()  # as in the first release, for what evaluations write
    with open(folder / "log.txt", "x", encoding="utf-8") as file:
        file.write(json.dumps(settings, indent=4) + "\n")


def continue_folder(
    folder: Path, earlier: Path, best_metric: float, belongs: Callable[[Mapping[str, Any]], bool]
) -> None:
    """Take into the folder of a resumed run what it goes on with beside the checkpoint `earlier`.

    These are the lines of metrics.jsonl and bad_batches.jsonl that `belongs` approves of, the pictures of the report,
    and the best checkpoint if it has this metric.
    """
    metrics.carry_over(earlier.with_name(metrics.NAME), folder / metrics.NAME, belongs)
    if earlier.with_name(BAD_BATCHES).is_file():
        metrics.carry_over(earlier.with_name(BAD_BATCHES), folder / BAD_BATCHES, belongs)
    with suppress(OSError):  # there are none, or the disk is full
        shutil.copytree(earlier.with_name(PICTURES), folder / PICTURES, dirs_exist_ok=True)
    best, own = earlier.with_name(BEST), folder / BEST
    try:
        is_best = best.is_file() and checkpoint.read_file(best).get("best_metric") == best_metric
    except checkpoint.CheckpointError as error:  # a run can go on without it
        logging.warning("The best checkpoint so far is not copied: %s", error)
        return
    if is_best:
        shutil.copyfile(best, own.with_suffix(".part"))
        own.with_suffix(".part").rename(own)
        logging.info("%s is the best checkpoint so far; it is copied.", best)


def _make_folder(folder: Path) -> list[Path]:
    """Make `folder`, or the first with a suffix that is free. Returns it, and the parents that were made for it."""
    missing = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)  # raises FileExistsError for a file or a broken link
    for number in count(1):
        own = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with suppress(FileExistsError):
            own.mkdir()
            return [own, *missing]
    raise AssertionError("count never ends")
