"""The folder of a run."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import count
from pathlib import Path

from minigpt4.common import dist_utils


@contextmanager
def reserved_folder(output_dir: str) -> Iterator[str]:
    """Make a folder for a run in `output_dir`, and yield its name (the job id), the same on every rank.

    The name is the time in seconds. A run that finds it taken gets a suffix, as in 20261130091500-2: making a folder is
    atomic, so runs that start together never share one. If nothing was written into the folder, it is removed at the
    end.
    """
    name = dist_utils.broadcast_object(_make_folder(output_dir) if dist_utils.is_main_process() else None)
    try:
        yield name
    finally:
        if dist_utils.is_main_process():
            with suppress(OSError):  # it is not empty
                folder_of(output_dir, name).rmdir()


def folder_of(output_dir: str, job_id: str) -> Path:
    """The folder of a run."""
    return Path(output_dir).expanduser() / job_id


def _make_folder(output_dir: str) -> str:
    start = datetime.now().strftime("%Y%m%d%H%M%S")
    folder_of(output_dir, start).parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        name = start if number == 1 else f"{start}-{number}"
        with suppress(FileExistsError):
            folder_of(output_dir, name).mkdir()
            return name
    raise AssertionError("count never ends")
