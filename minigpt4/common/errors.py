"""Mistakes of the user, and how a command reports them."""

import os
import time
from collections.abc import Callable, Collection, Iterable

from minigpt4.common.registry import UnknownNameError, did_you_mean

# Seconds that torchrun gets to end the other processes of a machine after the first has reported a mistake.
PATIENCE = 10


class ConfigError(ValueError):
    """A mistake in a YAML file, in `--options` or in a file they name.

    The message names the key or file, the mistake, and the fix. The commands print it without a traceback.
    """


def check_names(names: Iterable[str], known: Collection[str], unknown: Callable[[str], str]) -> None:
    """Raise ConfigError with the known names for the first name that is not among them.

    unknown: makes the beginning of the message from that name.
    """
    for name in names:
        if name not in known:
            raise ConfigError(f"{unknown(name)}.{did_you_mean(name, known)} Known: {', '.join(known) or 'none'}.")


def is_mistake(error: Exception) -> bool:
    """Whether one line says all about an error: a mistake in the settings, or a file that cannot be used.

    An OSError names a file, or its text is our own (such errors have no number). A FloatingPointError is ours: of
    numbers that are not finite.
    """
    if isinstance(error, OSError):
        return error.errno is None or error.filename is not None
    return isinstance(error, (ConfigError, UnknownNameError, FloatingPointError))


def format_error(error: Exception) -> str:
    """The text that a command prints when it ends with `error`.

    Most mistakes are found by all processes that torchrun started on a machine. So the others wait here for PATIENCE
    seconds: if the first process finds the mistake too, torchrun ends them before they print it again.
    """
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(PATIENCE)
    if isinstance(error, OSError) and error.filename is not None:
        return f"Error: {error.filename}: {error.strerror}."
    return f"Error: {error}"
