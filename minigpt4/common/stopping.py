"""Signals that ask a run to stop: it finishes the step, saves, and ends with a status by which a job script requeues.

SIGTERM and SIGUSR1 end with status REQUEUE, Ctrl-C with 130. A second signal leaves at once.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

REQUEUE = 75
"""Status (EX_TEMPFAIL) of a run that was asked to stop, and can go on."""
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
# Seconds in which torchrun may pass on a signal that a process has got already, such as Ctrl-C or that of a scheduler.
SAME_SIGNAL = 5.0
# Seconds between two looks at whether torchrun still lives, and seconds that a rank may go on without it.
WATCH, GRACE = 1.0, 30.0


class Stopped(KeyboardInterrupt):
    """The run was asked to stop by a signal. `status` is the exit status of the process."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.status = 128 + number if number == signal.SIGINT else REQUEUE

    def __str__(self) -> str:
        return "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name


class StopRequest:
    """Notes that a signal has asked the run to stop. While entered, signals do not end the process themselves.

    Until `begin_steps` is called there is nothing to save, and the first signal raises Stopped at once.
    """

    def __init__(self) -> None:
        self.number = 0
        """Of the first signal; 0: there was none."""
        self._at_once, self._since = False, 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        self.number, self._at_once = 0, True
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        if "TORCHELASTIC_RUN_ID" in os.environ:
            threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True, name="torchrun watch").start()
        return self

    def __exit__(self, *_) -> None:
        if self.number:
            end_children()
        for number, handler in self._before.items():
            # A rank that is done must not end by the signal that torchrun sends when another is done, too.
            signal.signal(number, signal.SIG_IGN if self.number else handler)
        self.number = 0

    def begin_steps(self) -> None:
        """From now on a signal is only noted, outside of `interruptible`."""
        self._at_once = False

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block, such as a wait for data, in which a signal raises Stopped at once."""
        before, self._at_once = self._at_once, True
        try:
            if self.number:
                raise Stopped(self.number)
            yield
        finally:
            self._at_once = before

    def until_stopped(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, until a signal asks to stop, also during the wait for one."""
        items = iter(items)
        with contextlib.suppress(Stopped):
            while True:
                with self.interruptible():
                    item = next(items, self)
                if item is self:
                    return
                yield item

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number:
            if "TORCHELASTIC_RUN_ID" in os.environ and now - self._since < SAME_SIGNAL:
                return
            os.write(2, b"A second signal: the run leaves at once.\n")
            end_children()
            os._exit(128 + number)
        self.number, self._since = number, now
        # Not by logging, which may be interrupted here in the middle of a line.
        os.write(
            2, f"{Stopped(number)}: the run finishes its step, saves and stops. A second leaves at once.\n".encode()
        )
        if self._at_once:
            raise Stopped(number)


def ignore_signals() -> None:
    """Let a data worker go on when a signal reaches all processes of a run: its batches are needed for the last step.

    The main process ends it (`end_children`).
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_children() -> None:
    """Kill the data workers of this process, and their commands (`pipe:` shards).

    A worker that hangs would keep the process waiting at its end.
    """
    children = multiprocessing.active_children()
    if children and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises an error in its handler
    for child in children:
        end_commands(child.pid)
        child.kill()


def end_commands(pid: int) -> None:
    """Kill all processes that a process has started. One that waits would outlive it."""
    import psutil  # a machine without the requirements is told so by what is imported at first

    with contextlib.suppress(psutil.Error):
        for command in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                command.kill()


def leave(status: int) -> None:
    """End this process now that all is saved.

    At Python's own end, output that nobody reads would change the status, by which a job script requeues.
    """
    end_children()  # at its end, Python would do so
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads it, or there is none
            stream.flush()
    os._exit(status)


def _end_with(parent: int) -> None:
    """Ask this process to stop once its parent is gone, and end it if it has not done so after GRACE seconds."""
    while os.getppid() == parent:
        time.sleep(WATCH)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(REQUEUE)


STOP = StopRequest()
"""The request of this process; train.py enters it."""
