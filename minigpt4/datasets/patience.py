"""Waits for files that are out of reach for a while: a file server or a network that comes back."""

import errno
import io
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from minigpt4.common.files import open_regular
from minigpt4.datasets.datasets.shards import is_local
from minigpt4.datasets.left_out import Tally

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# Waiting does not help: a pipe or a folder in place of a file.
FINAL = (errno.EINVAL, errno.EISDIR)
# Seconds before the first repetition. Each further pause is twice as long, up to LONGEST_PAUSE.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0
# Seconds to wait for a file that is out of reach while others of its dataset are not: it has probably been deleted. For
# each further one half as long, so that many of them do not stop a run.
WAIT_FOR_ONE = 10.0


# Gets the text of what this process reads, if it is a data worker.
_listener: Callable[[str], None] | None = None
_batch = ""


def listen(listener: Callable[[str], None]) -> None:
    """Let a function get the text of each batch and file that this process is at."""
    global _listener
    _listener = listener


@contextmanager
def at_batch(text: str) -> Iterator[None]:
    """While entered, this process makes a batch, which the text names. So does an error that is raised there."""
    global _batch
    _batch = text
    read_now("")
    try:
        yield
    except Exception as error:
        error.add_note(f"The data worker was at {text}.")
        raise
    finally:
        _batch = ""
        if _listener:
            _listener("")


def read_now(place: str) -> None:
    """Say which sample or file this process reads from now on, within `at_batch`."""
    if _listener and _batch:
        _listener(f"{_batch}, {place}" if place else _batch)


class OutOfReach(OSError):
    """A file stayed out of reach. The text is the system's own."""


class Patience:
    """Repeats what raises OSError, with growing pauses, for up to `timeout_s` seconds; counts the waits in `tally`.

    others_in_reach: whether other files of the dataset than this one can be read. Then this one has probably gone.
    Builders set `timeout_s` to `run.data_timeout_s`.

    The time is that of the whole outage: when it is over, other files are not waited for either, until one is read. A
    file that was waited for in vain is not waited for again.
    """

    def __init__(self, tally: Tally, others_in_reach: Callable[[str], bool]) -> None:
        self.tally, self.others_in_reach, self.timeout_s = tally, others_in_reach, 0.0
        self._outage_began: float | None = None
        self.given_up: set[str] = set()

    def retry(self, action: Callable[[], Result], path: str) -> Result:
        """The result of `action`, which reads `path`. Raises OutOfReach if that fails until the end of the wait."""
        read_now(path)
        try:
            result = action()
        except OSError as error:
            if error.errno in FINAL:
                raise
            result = self._wait(action, path, error)
        self._outage_began = None
        return result

    def _wait(self, action: Callable[[], Any], path: str, error: OSError) -> Any:
        start, pause = time.monotonic(), FIRST_PAUSE
        self._outage_began = start if self._outage_began is None else self._outage_began
        deadline = self._outage_began + self.timeout_s
        wait_for_one = WAIT_FOR_ONE / 2 ** min(len(self.given_up), 50)
        while path not in self.given_up and (left := deadline - time.monotonic()) > 0:
            if time.monotonic() - start > wait_for_one and self.others_in_reach(path):
                break
            if pause == 8 * FIRST_PAUSE:
                name = self.tally.name
                log.warning("%s: waiting up to %.0f s (run.data_timeout_s) for %s: %s", name, left, path, error)
            time.sleep(min(pause, left))
            pause = min(2 * pause, LONGEST_PAUSE)
            read_now(path)
            try:
                result = action()
            except OSError as latest:
                error = latest
                continue
            detail = f"{time.monotonic() - start:.1f} s; {error}"
            self.tally.drop("a file that was out of reach", path, detail, verb="waited for")
            return result
        self.given_up.add(path)
        raise OutOfReach(f"{type(error).__name__}: {error}") from error


def folder_in_reach(path: str) -> bool:
    """Whether a file's folder can be listed, and has files."""
    with suppress(OSError), os.scandir(os.path.dirname(path)) as entries:
        return next(entries, None) is not None
    return False


class PatientFile(io.RawIOBase):
    """The bytes of a shard: a path, a URL or `pipe:command`. After an outage it goes on where it was."""

    def __init__(self, shard: str, patience: Patience) -> None:
        self._shard, self._patience = shard, patience
        self._stream: Any = None
        self._position, self._ended = 0, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Raises OutOfReach if the shard cannot be read."""
        if self._ended:
            return 0
        content = self._patience.retry(lambda: self._read(len(buffer)), self._shard)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        self._close_stream()
        super().close()

    def _read(self, size: int) -> bytes:
        try:
            if self._stream is None:
                self._stream = open_shard(self._shard)
                _skip(self._stream, self._position)
            # A command's output itself: webdataset's `Pipe.read` throws it away if the command has failed.
            content = getattr(self._stream, "stream", self._stream).read(size)
            if not content:
                self._stream.close()  # raises for a command that failed
                self._ended = True
            return content
        except OSError:
            self._close_stream()
            raise

    def _close_stream(self) -> None:
        with suppress(OSError):  # of a command that was stopped before its end
            if self._stream is not None:
                self._stream.close()
        self._stream = None


def open_shard(shard: str) -> Any:
    """A readable stream of bytes. Raises OSError."""
    if is_local(shard):
        return open_regular(shard)
    import webdataset as wds  # imports torch

    return wds.gopen(shard)


def _skip(stream: Any, count: int) -> None:
    if count and hasattr(stream, "seek"):
        stream.seek(count)
        return
    while count:
        skipped = len(stream.read(min(count, 1 << 20)))
        if not skipped:
            raise OSError("it ended earlier than before")
        count -= skipped
