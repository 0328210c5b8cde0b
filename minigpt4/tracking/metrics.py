"""metrics.jsonl, the numbers of a run: one JSON object a line, with its step and the time (Unix, in seconds) first.

A line is written as a whole and at once. If the process is killed or the disk is full, at most the last line is cut
off. Readers pass over it, and a writer ends it before it adds another.
"""

import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from numbers import Real
from pathlib import Path
from typing import Any

from minigpt4.common.text import pluralize

NAME = "metrics.jsonl"
EXACT = 2**53
"""Beyond it, whole numbers are floats: some readers, and trackers, would round them."""
SAMPLES = "samples"
"""The name of the digest of all samples so far, by which runs are compared."""


class MetricsFile:
    """Appends lines to a file. If it cannot be written, the run goes on, and the first time there is a warning."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = None
        self._warned = False

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add a line with the numbers, full precision, and the texts. A number that is not finite becomes null."""
        line = {name: _as_json(value) for name, value in values.items() if isinstance(value, Real | str)}
        try:
            self._file = self._file or _open_to_append(self.path)
            text = json.dumps({"step": step, "time": round(time.time(), 3)} | line).encode() + b"\n"
            if self._file.write(text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        except OSError as error:  # the next line may find room again
            self._file = None
            if not self._warned:
                logging.warning("Lines of %s are missing; the run goes on. %s", self.path, error)
            self._warned = True

    def close(self) -> None:
        if self._file:
            self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order; those that are cut off are left out. Raises OSError."""
    return [found for _, found in _read(path)]


def carry_over(source: Path, target: Path, belongs: Callable[[dict[str, Any]], bool]) -> None:
    """Start a file of a resumed run with the lines of the earlier one that `belongs` approves of.

    So each file holds its whole run, and no step twice: the resumed run writes the others again.
    """
    try:
        lines = _read(source)
        kept = [line + b"\n" for line, found in lines if belongs(found)]
        if kept:
            target.write_bytes(b"".join(kept))
    except OSError as error:
        logging.info("%s: %s. The lines of the resumed run start at its checkpoint.", error.filename, error.strerror)
        return
    later = f"; {len(lines) - len(kept)} of later steps stay there" if len(kept) < len(lines) else ""
    logging.info("Taken over from %s: %s%s.", source, pluralize(len(kept), "line"), later)


def _read(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines of a file whose objects have a step, as they are and parsed."""
    lines = []
    for line in path.read_bytes().splitlines():
        try:
            found = json.loads(line.decode("utf-8", "surrogateescape"))
        except ValueError:
            continue
        if isinstance(found, dict) and type(found.get("step")) is int and abs(found["step"]) <= EXACT:
            lines.append((line, found))
    return lines


def plain(value: Any) -> Any:
    """A number, or a tensor with one, as an int or a float that is the same for all readers. Others stay as is."""
    if hasattr(value, "item"):
        with suppress(ValueError, RuntimeError):  # it has several
            value = value.item()
    if not isinstance(value, Real) or isinstance(value, int) and abs(value) <= EXACT:
        return value
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _as_json(value: Real | str) -> Any:
    """A value that every JSON reader takes."""
    value = plain(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _open_to_append(path: Path):
    """A file opened for appending, at the start of a line."""
    file = open(path, "ab+", buffering=0)  # with a buffer, the rest of a line that failed could be written later
    if file.tell():
        file.seek(-1, os.SEEK_END)
        if file.read() != b"\n":
            file.write(b"\n")
    return file
