"""Where commands write. Nothing that they did not write themselves is replaced or removed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minigpt4.common.errors import ConfigError


@contextmanager
def only_run(path: Path, flag: str = "--out") -> Iterator[None]:
    """While entered, no other run writes to this file or folder. It creates the folder around `path`.

    Raises ConfigError if another run does, and if there can be no such file or folder.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(
            f"{flag} {path}: another run is writing there. Wait until it ends, or name another place."
        ) from None
    except OSError as error:
        raise _unwritable(path, flag, error) from None
    try:
        yield
    finally:
        lock.release()


def own_folder(folder: Path, mark: str, flag: str = "--out") -> None:
    """Create a folder for a command's files, or go on with the one that an earlier run made.

    mark: a file that the command writes to the folder before any other, by which it knows the folder again.
    Raises ConfigError for a folder with files and without the mark, and for a path where there can be no folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Listed before the look for the mark: another rank may write the mark, and then files, meanwhile.
        others = [name for name in sorted(os.listdir(folder)) if not name.startswith(f".{mark}")]
    except OSError as error:
        raise _unwritable(folder, flag, error) from None
    if others and not (folder / mark).is_file():
        raise ConfigError(
            f"{flag} {folder} has files that this command did not write, e.g. {others[0]} (it knows its own folders by "
            f"their {mark}). Nothing was changed. Name a folder that is new or empty."
        )


def _unwritable(path: Path, flag: str, error: OSError) -> ConfigError:
    return ConfigError(f"{flag} {path} cannot be written: {error.strerror}. Name another place.")
