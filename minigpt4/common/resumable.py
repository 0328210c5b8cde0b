"""A JSONL file that several ranks append to, and that an interrupted run continues.

The settings that its lines depend on are kept beside it, in `<name>.settings.json`. They are written first, and mark
the JSONL file as the command's.
"""

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt4.common.errors import ConfigError
from minigpt4.common.output import only_run, write_whole


@dataclass(frozen=True)
class Lines:
    """The lines that a command writes."""

    command: str
    """The command, e.g. "minigpt4 caption"; it marks a settings file as this command's."""
    noun: str
    """A line, for messages: "caption"."""
    start: bytes
    """The beginning of each line."""
    key: Callable[[Any], str | None]
    """From a parsed line to its key, such as the name of a picture; None: the command did not write it."""

    def key_of(self, line: bytes) -> str | None:
        """The key of a line; None: this command did not write it."""
        try:
            return self.key(json.loads(line))
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
            return None


@contextmanager
def open_output(name: Path | None, settings: dict[str, Any], lines: Lines) -> Iterator["Output"]:
    """The `Output` of a run. No other run can have it meanwhile.

    Raises ConfigError for a path that is no file, one of another run, and as `Output` does.
    """
    from minigpt4.common import dist_utils

    if name is None:
        yield Output(None, settings, lines)
        return
    path = name.resolve()
    if path.is_dir():
        raise ConfigError(f"--out {name} is a folder; name a file in it.")
    if path.exists() and not (path.is_file() and os.access(path, os.R_OK | os.W_OK)):
        raise ConfigError(f"--out {name} is no file that can be written. Leave --out away to write to the screen.")
    # Before a file for the lock is written beside somebody else's file.
    dist_utils.from_main(lambda: check_output(path, settings, lines))
    with dist_utils.entered_by_main(only_run(path)):
        yield Output(path, settings, lines)


class Output:
    """The JSONL file, or the screen. Of several ranks, each writes to a file of its own until `finish`.

    Args:
        path: the JSONL file; None: the screen.
        settings: what the lines depend on, for JSON.

    Raises ConfigError for a file that this command did not write, and for one with lines of other settings. Nothing is
    changed then.
    """

    def __init__(self, path: Path | None, settings: dict[str, Any], lines: Lines):
        from minigpt4.common import dist_utils

        self._path = self._own = path
        self._lines = lines
        self.done: set[str] = set()
        if path is None:
            return
        if dist_utils.is_distributed():
            self._own = path.with_name(f"{path.name}.part{dist_utils.get_rank()}")
        dist_utils.from_main(lambda: check_output(path, settings, lines))
        kept = json.dumps({"command": lines.command, "settings": settings})
        dist_utils.from_main(lambda: write_whole(_settings_file(path), f"{kept}\n"))
        self.finish()  # an earlier run
        if path.is_file():
            self.done = {lines.key_of(line) for line in whole_lines(path, lines)}
        dist_utils.barrier()  # all ranks have read before any writes

    def write(self, entries: list[dict]) -> None:
        """Append lines. They are on disk when this returns, so that an interrupted run can be continued."""
        lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
        if self._path is None:
            sys.stdout.write(lines)
            sys.stdout.flush()
            return
        with self._own.open("ab") as file:
            # A file name that is not UTF-8 has lone surrogates. JSON escapes them just like Python's backslashreplace.
            file.write(lines.encode("utf-8", "backslashreplace"))

    def finish(self) -> None:
        """Rank 0 appends the files of all ranks to the JSONL file."""
        from minigpt4.common import dist_utils

        dist_utils.barrier()  # all ranks have written
        if self._path:
            dist_utils.from_main(self._append_parts)

    def _append_parts(self) -> None:
        lines = self._lines
        for part in _parts(self._path):
            # A part that was appended, but not yet removed when a run ended, is not appended again.
            done = {lines.key_of(line) for line in whole_lines(self._path, lines)} if self._path.exists() else set()
            with self._path.open("ab") as file:
                file.writelines(line for line in whole_lines(part, lines) if lines.key_of(line) not in done)
            part.unlink()

    def write_errors(self, errors: dict[str, str]) -> Path | None:
        """Keep why items have no line, {name: cause}, in place of what an earlier run kept. Returns the file."""
        if self._path is None:
            return None
        file = _errors_file(self._path)
        if errors or file.exists():
            lines = (json.dumps({"name": name, "error": cause}, ensure_ascii=False) for name, cause in errors.items())
            write_whole(file, "".join(f"{line}\n" for line in lines))
        return file


def check_output(path: Path, settings: dict[str, Any], lines: Lines) -> None:
    """Raise ConfigError if `path`, or a part of it, has lines of others, or lines of other settings."""
    kept = _kept_settings(path, lines)
    _check_errors_file(path, lines)
    files = [file for file in (path, *_parts(path)) if file.exists()]
    written = [line for file in files for line in _look(file, lines, marked=kept is not None)[0]]
    if written and kept is None:
        unmarked = "%s has no settings file beside it. Its %ss count as made with these settings."
        logging.warning(unmarked, path, lines.noun)
    elif written:
        now = json.loads(json.dumps(settings))
        keys = [key for key in sorted(kept.keys() | now.keys()) if kept.get(key) != now.get(key)]
        differences = [f"{key}: {kept.get(key)!r} there, {now.get(key)!r} here" for key in keys]
        if differences:
            raise ConfigError(
                f"--out {path} has {lines.noun}s that were made with other settings. Name another place, or use the "
                f"same settings ({_settings_file(path).name} has them):\n  " + "\n  ".join(differences)
            )


def _settings_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings.json")


def _errors_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.errors.jsonl")


def _check_errors_file(path: Path, lines: Lines) -> None:
    """Raise ConfigError if there is a file in the place of the causes that this command did not write."""

    def check(content: bytes) -> None:
        if any(json.loads(line).keys() != {"name", "error"} for line in content.splitlines()):
            raise ValueError

    _read_beside(path, _errors_file(path), check, f"a file of causes of `{lines.command}`")


def _kept_settings(path: Path, lines: Lines) -> dict[str, Any] | None:
    """The settings beside a JSONL file; None: there are none. Raises ConfigError for a file that has something else."""

    def settings(content: bytes) -> dict[str, Any]:
        kept = json.loads(content)
        if kept["command"] != lines.command:
            raise ValueError
        return kept["settings"]

    return _read_beside(path, _settings_file(path), settings, f"a settings file of `{lines.command}`")


def _read_beside(path: Path, file: Path, parse: Callable[[bytes], Any], kind: str) -> Any | None:
    """A parsed file beside `path`; None: there is none. Raises ConfigError if it cannot be parsed as of this kind."""
    try:
        return parse(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ConfigError(f"--out {path}: {file.name} beside it is not {kind}. Name another --out.") from None


def _parts(path: Path) -> list[Path]:
    """The files of the ranks of an interrupted run."""
    form = re.compile(re.escape(path.name) + r"\.part\d+")
    return sorted(file for file in path.parent.glob("*.part*") if form.fullmatch(file.name))


def whole_lines(path: Path, lines: Lines) -> list[bytes]:
    """The lines of a file as `_look` finds them. The last one is completed, or removed if it was cut off."""
    found, cut_off = _look(path, lines, marked=True)
    whole = sum(map(len, found))
    if cut_off:
        logging.warning("%s ends in a line that was cut off, which is removed: %r", path, cut_off)
        os.truncate(path, whole)
    elif whole > path.stat().st_size:
        with path.open("ab") as file:
            file.write(b"\n")
    return found


def _look(path: Path, lines: Lines, marked: bool) -> tuple[list[bytes], bytes]:
    """The lines of a file, with their line breaks; and the beginning of one that a run was interrupted in.

    marked: there is a settings file beside the file.

    Raises ConfigError for a file that this command did not write.
    """
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    found = content[:end].splitlines(keepends=True)  # of bytes, since U+2028 in a text would end a line of text
    rest = content[end:]
    cut_off = rest if (marked or found) and _is_cut_off(rest, lines.start) else b""
    if rest and not cut_off:
        found.append(rest + b"\n")
    for line in found:
        if lines.key_of(line) is None:
            what = f"its line {line[:60]!r} is not one of `{lines.command}`"
            raise ConfigError(f"--out {path} exists, and {what}. Name another place.")
    return found, cut_off


def _is_cut_off(line: bytes, start: bytes) -> bool:
    """Whether a line is the beginning of one that this command writes."""
    try:
        text = line.decode(errors="ignore")  # which leaves out the half of a character at the end
        json.loads(text)
    except json.JSONDecodeError as error:
        unfinished = error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip())
        return unfinished and (line.startswith(start) or start.startswith(line))
    except (ValueError, RecursionError):
        return False
    return False
