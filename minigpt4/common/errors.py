"""The error that is the user's to mend, and how a command tells it."""

import os
import time

# Seconds that torchrun gets to end the other processes of a machine after the first has told a mistake.
PATIENCE = 10


class ConfigError(ValueError):
    """A mistake in a YAML file, in `--options` or in a file they name.

    The message names the key or file, what is wrong with it, and the fix; the commands print it without a traceback.
    """


def format_error(error: Exception) -> str:
    """What a command prints as it ends with `error`, once for all processes that torchrun started on a machine.

    Mistakes are mostly found by all of them. The others leave it to the first, whose end torchrun makes theirs; one
    that is still there after a while has found what the first has not.
    """
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(PATIENCE)
    return f"Error: {error}"
