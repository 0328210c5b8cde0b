"""A tracker in a process of its own, which cannot hold up the run, nor its end for long.

The run writes to the process through a queue and a thread, so that it never waits. The process reads until it gets None
at the end of the run, or the run is gone, and then has PATIENCE seconds. It is in a session of its own: Ctrl-C reaches
the run alone.
"""

import importlib
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil

from minigpt4.common.registry import registry
from minigpt4.tracking.trackers import RunInfo

# Seconds that a tracker may take for what is left at the end of a run.
PATIENCE = 9
# Lines that may wait for a tracker before it is given up.
MAX_WAITING = 1000


class TrackerProcess:
    """Starts the tracker that is registered as `name`. Nothing here raises: a tracker that fails is dropped."""

    def __init__(self, name: str, run: RunInfo) -> None:
        self.name = name
        self._waiting: queue.Queue = queue.Queue(MAX_WAITING)
        self._unsent = ""
        tracker = registry.get("tracker", name)
        command = [sys.executable, "-m", __name__, tracker.__module__, tracker.__qualname__]
        paths = os.pathsep.join(filter(None, sys.path))  # of plug-ins
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths},
            start_new_session=True,
        )
        self._waiting.put(run)
        threading.Thread(target=self._send, daemon=True, name=name).start()

    def log(self, step: int, values: Mapping[str, Any]) -> bool:
        """Hand on a line. False: the tracker was dropped, with a warning."""
        if self._process.poll() is not None:
            return self._drop(self._failure())
        try:
            self._waiting.put_nowait((step, dict(values)))
        except queue.Full:
            return self._drop(f"{MAX_WAITING} lines wait for it")
        return True

    def close(self) -> None:
        """Tell the tracker to close, without waiting for it."""
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            self._drop(f"{MAX_WAITING} lines wait for it")

    def wait(self, deadline: float) -> None:
        """Wait for the closed tracker until `deadline`, a value of `time.monotonic`, and end it then."""
        try:
            if self._process.wait(max(deadline - time.monotonic(), 0)):
                self._drop(self._failure())
        except subprocess.TimeoutExpired:
            self._drop(f"it has not finished {PATIENCE} s after the run")

    def _send(self) -> None:
        try:
            item = True
            while item is not None:  # workers that were forked hold the pipe open, so None tells the end
                item = self._waiting.get()
                self._process.stdin.write(pickle.dumps(item))
                self._process.stdin.flush()
        except OSError:
            pass  # the process has ended, which `log` and `wait` find out
        except Exception as error:  # a value that cannot be pickled
            self._unsent = f"{type(error).__name__}: {error}"
            self._process.kill()

    def _failure(self) -> str:
        os.set_blocking(self._process.stdout.fileno(), False)  # a process that it forked may hold the pipe open
        said = self._unsent or (self._process.stdout.read() or b"").decode(errors="replace").strip()
        return said or f"its process ended with status {self._process.returncode}"

    def _drop(self, reason: str) -> bool:
        logging.warning("run.trackers: %s is dropped, and the run goes on: %s.", self.name, reason)
        with suppress(psutil.Error):  # it has ended
            for process in psutil.Process(self._process.pid).children(recursive=True):
                process.kill()
        with suppress(OSError):  # with those that it left behind
            os.killpg(self._process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        return False


def main(module: str, name: str) -> None:
    """Run a tracker: read a `RunInfo` and lines from stdin until it ends. The reason of a failure goes to stdout."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
    os.dup2(2, 1)  # trackers print
    try:
        tracker_class = importlib.import_module(module)
        for part in name.split("."):
            tracker_class = getattr(tracker_class, part)
        tracker = tracker_class(pickle.load(sys.stdin.buffer))
        with suppress(EOFError):  # the run is gone
            while (line := pickle.load(sys.stdin.buffer)) is not None:
                tracker.log(*line)
        threading.Timer(PATIENCE, os._exit, [1]).start()
        tracker.close()
    except Exception as error:
        answer.write(f"{type(error).__name__}: {error}".splitlines()[0])
        answer.flush()
        os._exit(1)  # threads of the tracker may hang
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
