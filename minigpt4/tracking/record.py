"""Everything that a run writes down while it trains: log.txt, metrics.jsonl and its trackers."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from minigpt4.common.html_page import small_jpeg
from minigpt4.common.output import write_whole
from minigpt4.tracking import metrics, process
from minigpt4.tracking.trackers import RunInfo, is_picture

PICTURES = "pictures"
"""The folder of the latest picture of each name."""


class RunRecord:
    """The record of a run. A part that fails is reported, and never ends the run.

    trackers: their registered names. They start with the first call of `log`.
    """

    def __init__(self, run: RunInfo, trackers: Sequence[str]) -> None:
        self.run = run
        self._metrics = metrics.MetricsFile(Path(run.folder) / metrics.NAME)
        self._to_start, self._trackers = list(trackers), []

    def log(self, step: int, values: Mapping[str, Any], samples: str = "") -> None:
        """Record numbers, texts and pictures (PIL images) by name. Pictures go to trackers and, small, to PICTURES.

        samples: the digest of the samples so far, for metrics.jsonl only.
        """
        values = {name: metrics.plain(value) for name, value in values.items()}
        self._metrics.write(step, {**values, metrics.SAMPLES: samples} if samples else values)
        for name, picture in values.items():
            if is_picture(picture):
                self._keep(name, picture)
        while self._to_start:
            self._start(self._to_start.pop(0))
        self._trackers = [tracker for tracker in self._trackers if tracker.log(step, values)]

    def has(self, step: int, name: str) -> bool:
        """Whether a value was recorded for a step, also by the run that is resumed."""
        with suppress(OSError):
            return any(name in line and line["step"] == step for line in metrics.read_metrics(self._metrics.path))
        return False

    def append(self, name: str, entry: Mapping[str, Any]) -> None:
        """Add a line of JSON to a file of the run's folder."""
        try:
            with open(Path(self.run.folder) / name, "a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        except OSError as error:  # the log on the screen says the same
            logging.warning("Nothing was added to %s; the run goes on. %s", name, error)

    def _keep(self, name: str, picture: Any) -> None:
        """Write a picture for the report, in place of an earlier one of this name."""
        folder = Path(self.run.folder) / PICTURES
        try:
            folder.mkdir(exist_ok=True)
            small = small_jpeg(picture.copy())  # of a file not read yet, it would leave the trackers a small one, too
            write_whole(folder / f"{quote(name, safe=' ')}.jpg", small)
        except Exception as error:  # Pillow raises any kind for a file that it has not read yet, and cannot
            logging.warning("The report will lack the picture %s; the run goes on. %s", name, error)

    def close(self) -> None:
        """Close files and trackers, for which the run waits `process.PATIENCE` seconds at most."""
        self._metrics.close()
        for tracker in self._trackers:
            tracker.close()
        deadline = time.monotonic() + process.PATIENCE
        for tracker in self._trackers:
            tracker.wait(deadline)
        self._trackers = []

    def _start(self, name: str) -> None:
        try:
            self._trackers.append(process.TrackerProcess(name, self.run))
        except OSError as error:
            logging.warning("run.trackers: %s cannot be started, and the run goes on: %s.", name, error)
