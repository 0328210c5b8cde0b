"""How a command ends with an error: a mistake of the user in one line; of several processes, the first one says why."""

import os
import platform
import re
import signal
import time
import traceback
from pathlib import Path

from minigpt4.common.errors import ConfigError, UnusableDataError
from minigpt4.common.registry import UnknownNameError
from minigpt4.common.stopping import STOP

# Seconds that torchrun gets to end the other processes of a machine after the first has reported a mistake.
PATIENCE = 10
# Frames of a traceback that a process of several prints.
FRAMES = 8
# How torch reports that another process is gone, or does not come for `run.timeout_minutes`.
LOST = re.compile(
    r"^Dist\w*Error|gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|[Tt]imed out (waiting|after)|Socket Timeout"
)
# In the environment of processes that torchrun started.
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def is_mistake(error: Exception) -> bool:
    """Whether one line says all about an error: a mistake in the settings, or a file that cannot be used.

    An OSError names a file, or its text is our own (such errors have no number). A FloatingPointError is ours: of
    numbers that are not finite.
    """
    if isinstance(error, OSError):
        return error.errno is None or error.filename is not None
    return isinstance(error, (ConfigError, UnusableDataError, UnknownNameError, FloatingPointError))


def format_error(error: Exception) -> str:
    """The text that a command prints when it ends with `error`.

    Most mistakes are found by all processes of a machine. Under torchrun, all but the first that finds it wait here for
    PATIENCE seconds: torchrun ends them before they print it again.
    """
    if not fails_first():
        time.sleep(PATIENCE)
    if isinstance(error, OSError) and error.filename is not None:
        return f"Error: {error.filename}: {error.strerror}."
    return f"Error: {error}"


def failure_text(error: Exception) -> str:
    """The text that a process prints when it ends with `error`. Raises `error` if this process is the only one.

    Of several processes, the first that fails on a machine prints its traceback, beginning with its last FRAMES frames.
    The others wait until torchrun ends them. Without torchrun, ranks that have lost another say so in one line.
    """
    if is_mistake(error):
        return format_error(error)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        raise error
    rank = f"Rank {os.environ.get('RANK', '?')} on {platform.node()}"
    if LOST.search(f"{type(error).__name__}: {error}") or not fails_first():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if ERROR_FILE in os.environ and not STOP.number:  # else it will not end this process, or has asked it before
            time.sleep(2 * PATIENCE)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        hint = "Its lines say why; without any, it was killed, or is still busy after run.timeout_minutes."
        return f"{rank} has lost another rank ({reason}). {hint}"
    trace = "".join(traceback.format_exception(error, limit=-FRAMES)).rstrip()
    return f"{rank} is the first to fail:\n{trace}"


def fails_first() -> bool:
    """Whether no other process of this machine has called this before. Without torchrun, each counts as the first.

    torchrun makes a folder for the errors of each attempt, and removes it.
    """
    if ERROR_FILE not in os.environ:
        return True
    try:
        (Path(os.environ[ERROR_FILE]).parents[1] / "first_to_fail").touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        return int(os.environ.get("LOCAL_RANK", 0)) == 0
    return True
