"""Counts what a dataset leaves out, by cause, with few warnings; ends a stream that leaves out nearly everything."""

import logging
from collections import Counter

from minigpt4.common.errors import UnusableDataError
from minigpt4.common.text import printable

log = logging.getLogger(__name__)

# A warning quotes at most this many characters of a detail.
MAX_DETAIL = 200


class Tally:
    """Counts of a process by cause. It warns at the 1st, 10th, 100th … of a cause.

    name: the dataset's name in the YAML, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.left_out: Counter[str] = Counter()  # by cause, since the start of the process
        self._unreported: Counter[tuple[str, ...]] = Counter()  # since the last `take`

    def drop(self, cause: str, where: str, detail: str = "", verb: str = "left out") -> None:
        """Count something that is left out. where: its shard or file. verb: what was done with it, if not that."""
        where, detail = printable(where), printable(detail)
        self.left_out[cause] += 1
        self._unreported[(cause, where) if verb == "left out" else (cause, where, verb)] += 1
        count = self.left_out[cause]
        if count == 10 ** (len(str(count)) - 1):
            detail = detail if len(detail) <= MAX_DETAIL else detail[:MAX_DETAIL] + "…"
            place = f"{where} ({detail})" if detail else where
            place = place.encode("utf-8", errors="backslashreplace").decode()  # a tar's names may be in any encoding
            log.warning("%s: %s %s: %s. So far in this process: %d.", self.name, verb, cause, place, count)

    def take(self) -> Counter[tuple[str, ...]]:
        """Counts since the last call, by (cause, where), or (cause, where, verb) of what was not left out."""
        taken, self._unreported = self._unreported, Counter()
        return taken


class Gate(Tally):
    """Counts also the samples that pass a stage of a stream.

    A stream is given up if at most MIN_KEPT of the samples in a window pass.
    """

    WINDOW = 1000  # samples in a window
    MIN_SAMPLES = 100  # a shorter window is not judged
    MIN_SHARDS = 3  # nor one with fewer affected shards, unless these are all
    MIN_KEPT = 0.05

    def __init__(self, name: str, num_shards: int) -> None:
        super().__init__(name)
        self.num_shards = num_shards
        self.open_window()

    def open_window(self) -> None:
        """Start a new window."""
        self.kept = 0
        self.causes: Counter[str] = Counter()
        self.bad_shards: Counter[str] = Counter()

    @property
    def seen(self) -> int:
        """Samples in the window, and shards left out."""
        return self.kept + self.causes.total()

    def keep(self) -> None:
        """Count a sample that passes."""
        self.kept += 1

    def drop(self, cause: str, where: str, detail: str = "", verb: str = "left out") -> None:
        """Count a sample, or a shard, that is left out."""
        if verb == "left out":
            self.causes[cause] += 1
            self.bad_shards[where] += 1
        super().drop(cause, where, detail, verb)

    def check(self) -> None:
        """Raise RuntimeError if nearly everything in the window was left out."""
        if self.seen < self.MIN_SAMPLES or len(self.bad_shards) < min(self.MIN_SHARDS, self.num_shards):
            return
        if self.kept <= self.MIN_KEPT * self.seen:
            causes = ", ".join(f"{count} × {cause}" for cause, count in self.causes.most_common())
            shard, count = self.bad_shards.most_common(1)[0]
            raise UnusableDataError(
                f"datasets.{self.name}: of the last {self.seen} samples only {self.kept} could be used: {causes}; "
                f"in {len(self.bad_shards)} of {self.num_shards} shards, e.g. {shard} ({count} times). "
                f"Check the shards, or name others with --options datasets.{self.name}.build_info.storage=…"
            )
        if self.seen >= self.WINDOW:
            self.open_window()
