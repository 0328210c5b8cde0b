"""Output of commands. Nothing that a command did not write itself is replaced or removed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minigpt4.common.errors import ConfigError

PART = ".part"
"""The end of the names of files and folders that are not whole yet."""


@contextmanager
def only_run(path: Path) -> Iterator[None]:
    """While entered, no other run writes to this folder, or to this file, whose folder is created.

    Raises ConfigError if another run does, and if nothing can be written there.
    """
    with _locked(path / ".lock" if path.is_dir() else path.parent / f".{path.name}.lock", path):
        yield


@contextmanager
def _locked(file: Path, path: Path) -> Iterator[None]:
    """While entered, no other process has locked `file`. Errors name `path`."""
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise ConfigError(f"--out {path}: another run is writing there. Wait for it, or name another place.") from None
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error.strerror}. Name another place.") from None
    try:
        yield
    finally:
        lock.release()


def make_folder(folder: Path) -> None:
    """Create a folder, unless it exists. Raises ConfigError if there can be no folder at this path."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be a folder: {error.strerror}. Name another place.") from None


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write a file as a whole, in place of an earlier one, which stays if this fails. Returns its path.

    Several processes may write the same file.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_bytes(content if isinstance(content, bytes) else content.encode(errors="backslashreplace"))
    return part.replace(path)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `folder`, new or empty, at the end.

    If the writing fails nothing is left, and an empty folder stays. Raises ConfigError as `only_run` does.
    """
    # Where `folder` cannot be replaced, its files are moved into it.
    fixed = folder.is_dir() and (os.path.ismount(folder) or not os.access(folder.parent, os.W_OK))
    part = folder / PART if fixed else folder.with_name(f".{folder.name}{PART}")
    lock = part.with_name(f"{part.name}.lock")
    with _locked(lock, folder):
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        part.mkdir()
        try:
            yield part
            if fixed:
                for path in part.iterdir():
                    path.rename(folder / path.name)
            else:
                part.replace(folder)
        except Exception as error:
            if not isinstance(error, OSError) and "(os error " in str(error):  # of a library in Rust, on a full disk
                raise ConfigError(f"--out {folder} cannot be written: {error}. Name another place.") from error
            raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
            lock.unlink(missing_ok=True)


def is_taken(path: Path) -> bool:
    """Whether there is something at a path, beside what `whole_folder` may have left when it was killed."""
    if path.is_dir():
        return any(name not in (PART, f"{PART}.lock") for name in os.listdir(path))
    return os.path.lexists(path)


def own_folder(folder: Path, mark: str) -> None:
    """Create a folder for a command's files, or go on with the one that an earlier run made.

    mark: a file that the command writes to the folder before any other, by which it knows the folder again.
    Raises ConfigError for a folder with files and without the mark, and for a path where there can be no folder.
    """
    make_folder(folder)
    # Listed before the look for the mark: another rank may write the mark, and then files, meanwhile.
    others = [name for name in sorted(os.listdir(folder)) if not _may_be_left(name, mark)]
    if others and not (folder / mark).is_file():
        raise ConfigError(
            f"--out {folder} has files that this command did not write, e.g. {others[0]} (it knows its own folders by "
            f"their {mark}). Nothing was changed. Name a folder that is new or empty."
        )


def _may_be_left(name: str, mark: str) -> bool:
    """Whether a file may be of a run that ended before it wrote the mark: a lock, or a file that was not finished."""
    return name.startswith(f".{mark}") or (name.startswith(".") and name.endswith((".lock", ".part")))
