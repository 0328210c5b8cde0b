"""The files of checkpoints: writing them, which are kept, and from which one a run goes on.

`checkpoint_3.pth` is that after epoch 3, `checkpoint_3_1200.pth` that after 1,200 micro-batches of epoch 3.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from minigpt4.common import dist_utils, facts
from minigpt4.common.schema import AUTO, RunConfig
from minigpt4.runners.entries import check_entries
from minigpt4.weights import checkpoint
from minigpt4.weights.checkpoint import CheckpointError

BEST = "checkpoint_best.pth"
# Checkpoints within epochs that are kept if `run.keep_last` is not set.
KEPT_WITHIN_EPOCHS = 2
# Saves in a row that may fail.
MAX_FAILURES = 3


class Checkpoints:
    """Writes the checkpoints of a run into its folder, on rank 0.

    If one cannot be written the run goes on, and tries again at the next save; MAX_FAILURES times in a row end it.
    Only files that were written here, and were not changed since, are removed. keep_last: `run.keep_last`.
    """

    def __init__(self, folder: Path, keep_last: int | None, resumed: Path | None) -> None:
        self.folder, self.keep_last = folder, keep_last
        self.last = resumed
        """The newest one: that which was written last, or from which the run goes on."""
        self._written: dict[Path, tuple[int, int, int]] = {}
        self._failures = 0

    def write(self, content: dict, name: str, is_best: bool = False) -> None:
        """Write a checkpoint; if it is the best, first a copy as checkpoint_best.pth. Then remove old ones.

        Raises CheckpointError if this fails for the third time in a row.
        """
        path, what = self.folder / name, f"checkpoint at epoch {content['epoch']}"
        if all(self._save(content, each, what) for each in [*([self.folder / BEST] if is_best else []), path]):
            self._failures, self.last = 0, path
            self._written[path] = _identity(path)
            self._remove_old()

    def write_best(self, content: dict, step: int) -> None:
        """Write weights from which no run goes on as checkpoint_best.pth."""
        self._save(content, self.folder / BEST, f"weights of step {step}")

    def _save(self, content: dict, path: Path, what: str) -> bool:
        """Write a file. Returns whether that succeeded."""
        if path != self.last:  # else only what the validation found is added
            logging.info("Saving %s to %s.", what, path)
        try:
            checkpoint.save(content, path)
            return True
        except CheckpointError as error:
            self._failures += 1
            on_disk = "There is no checkpoint of this run on the disk."
            if self.last and self.last.is_file():
                on_disk = f"The newest checkpoint is {self.last}."
            if self._failures == MAX_FAILURES:
                times = f"This was the {MAX_FAILURES}rd time in a row; the run stops."
                raise CheckpointError(f"{error} {times} {on_disk}") from error
            logging.warning("%s The run goes on, and tries again at the next save. %s", error, on_disk)
            return False

    def _remove_old(self) -> None:
        newest_first = sorted(self._written, key=facts.place_of_checkpoint, reverse=True)
        within = [path for path in newest_first if facts.place_of_checkpoint(path)[1] != facts.END]
        # Without `run.keep_last`, those of epochs stay.
        old = within[KEPT_WITHIN_EPOCHS:] if self.keep_last is None else newest_first[self.keep_last :]
        for path in old:
            identity = self._written.pop(path)
            try:
                if _identity(path) == identity:
                    path.unlink()
            except OSError as error:
                logging.warning("run.keep_last: %s is not removed: %s.", path, error.strerror)


def _identity(path: Path) -> tuple[int, int, int]:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def find(run: RunConfig, differences: Callable[[Mapping[str, Any]], list[str]]) -> Path | None:
    """The checkpoint that `run.resume_ckpt_path` stands for, the same on all ranks; None: a new run starts.

    Of a folder, and of `auto`, it is the newest that can be read; `auto` also passes over those of other runs. Both are
    said in the log.

    differences: from the run whose checkpoint has a content; any makes it another run.
    Raises CheckpointError if a folder has none that can be read.
    """
    source = run.resume_ckpt_path
    if source != AUTO and not Path(source).expanduser().is_dir():
        return checkpoint.resolve(source)
    return dist_utils.from_main(lambda: _newest_valid(run, differences))


def _newest_valid(run: RunConfig, differences: Callable[[Mapping[str, Any]], list[str]]) -> Path | None:
    source, problems = run.resume_ckpt_path, []
    is_auto = source == AUTO
    if is_auto:
        candidates = _of_all_runs(Path(run.output_dir).expanduser())
    else:
        candidates = facts.checkpoints_in(checkpoint.resolve(source).parent)
    for path in candidates:
        try:
            content = checkpoint.read_file(path)
            check_entries(content, str(path))
        except (CheckpointError, OSError) as error:
            problems.append(error)
            logging.warning("Passed over, and the one before is tried: %s", error)
            continue
        breaking = differences(content) if is_auto and not run.resume_anyway else []
        if not breaking:
            logging.info("run.resume_ckpt_path=%s: the run goes on from %s.", source, path)
            return path
        shown = "; ".join(breaking[:3])
        logging.warning("run.resume_ckpt_path=auto: %s is passed over, as it is of another run: %s", path, shown)
    if is_auto:
        logging.info("run.resume_ckpt_path=auto: there is no checkpoint to go on from; a new run starts.")
        return None
    raise problems[0]


def _of_all_runs(output_dir: Path) -> Iterator[Path]:
    """The checkpoints in all run folders, first those of the run that wrote one last."""
    runs = []
    for folder in output_dir.iterdir() if output_dir.is_dir() else ():
        try:
            found = facts.checkpoints_in(folder) if folder.is_dir() else []
        except OSError as error:  # another user's
            logging.warning("run.resume_ckpt_path=auto: %s is passed over: %s.", folder, error.strerror)
            continue
        runs += [found] if found else []
    for found in sorted(runs, key=lambda paths: max(map(_written_at, paths)), reverse=True):
        yield from found


def _written_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # another run has just removed it
        return 0
