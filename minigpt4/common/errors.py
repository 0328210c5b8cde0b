"""Mistakes of the user."""

from collections.abc import Callable, Collection, Iterable

from minigpt4.common.registry import did_you_mean


class ConfigError(ValueError):
    """A mistake in a YAML file, in `--options` or in a file they name.

    The message names the key or file, the mistake, and the fix. The commands print it without a traceback.
    """


class UnusableDataError(RuntimeError):
    """Data of which hardly anything can be used. The commands print the message without a traceback."""

    def __str__(self) -> str:
        """The message, without the traceback that torch puts before one of a data worker."""
        return super().__str__().rpartition(f"{type(self).__name__}: ")[2].strip()


def check_names(names: Iterable[str], known: Collection[str], unknown: Callable[[str], str]) -> None:
    """Raise ConfigError with the known names for the first name that is not among them.

    unknown: makes the beginning of the message from that name.
    """
    for name in names:
        if name not in known:
            raise ConfigError(f"{unknown(name)}.{did_you_mean(name, known)} Known: {', '.join(known) or 'none'}.")
