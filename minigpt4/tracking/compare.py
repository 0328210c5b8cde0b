"""What differs between two runs, from the files in their folders: settings, environment, numbers, samples."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from minigpt4.common.errors import ConfigError
from minigpt4.tracking import metrics
from minigpt4.tracking.run_files import CONFIG, ENVIRONMENT

# They differ between any two runs.
OF_EACH_RUN = ("started", "command", "again", "working_directory", "changed_settings", "machine.host")
# Of time and memory.
MEASURED = ("_seconds", "_per_second", "_mib")
NOTHING = "nothing"


class Difference(NamedTuple):
    """A setting, or another fact, of two runs."""

    name: str
    first: Any
    second: Any

    def __str__(self) -> str:
        return f"{self.name}: {_shown(self.first)} | {_shown(self.second)}"


class Numbers(NamedTuple):
    """How the numbers of two runs compare."""

    steps: int
    """Steps that both have."""
    last: int
    """The last of them."""
    only: tuple[int, int]
    """Steps that only the first or only the second run has."""
    names: list[str]
    """What was compared."""
    first_differences: dict[int, list[Difference]]
    """For each name that differs, where it does first; by step, in order."""


def settings(folders: tuple[Path, Path]) -> list[Difference]:
    """Settings that differ. Raises ConfigError for a folder that is no run's."""
    return _differences(*(_mapping(_file(each, CONFIG), yaml.safe_load) for each in folders))


def environments(folders: tuple[Path, Path]) -> list[Difference]:
    """Versions, machine, variables and git states that differ. Raises ConfigError for a folder that is no run's."""
    found = []
    for folder in folders:
        about = _mapping(_file(folder, ENVIRONMENT), json.loads)
        about["git"] = {f"repository {number}": state for number, state in enumerate(about.get("git", []))}
        for state in about["git"].values():
            state.pop("folder", None)
        found.append(about)
    return [each for each in _differences(*found) if not each.name.startswith(OF_EACH_RUN)]


def numbers(folders: tuple[Path, Path]) -> Numbers:
    """Compare the lines of metrics.jsonl step by step. Raises ConfigError for a folder without one."""
    first, second = (_by_step(_file(each, metrics.NAME)) for each in folders)
    common = sorted(first.keys() & second.keys())
    found: dict[str, tuple[int, Difference]] = {}
    names: dict[str, None] = {}
    for step in common:
        for name in first[step] | second[step]:
            names[name] = None
            values = first[step].get(name, NOTHING), second[step].get(name, NOTHING)
            if values[0] != values[1] and name not in found:
                found[name] = step, Difference(name, *values)
    by_step: dict[int, list[Difference]] = {}
    for step, difference in sorted(found.values(), key=lambda each: each[0]):
        by_step.setdefault(step, []).append(difference)
    only = len(first.keys() - second.keys()), len(second.keys() - first.keys())
    return Numbers(len(common), common[-1] if common else 0, only, list(names), by_step)


def _by_step(path: Path) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for line in metrics.read_metrics(path):
        values = {name: value for name, value in line.items() if not name.endswith(MEASURED)}
        step, _ = values.pop("step"), values.pop("time", None)
        found.setdefault(step, {}).update(values)
    return found


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise ConfigError(f"{folder} is no folder of a run: it has no {name}.")
    return folder / name


def _mapping(path: Path, parse: Callable[[str], Any]) -> dict:
    """The content of a file of settings. Raises ConfigError for one that is damaged."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is damaged: it cannot be read as settings. Restore it, or compare other runs.")
    return content


def _differences(first: Mapping, second: Mapping) -> list[Difference]:
    first, second = dict(_flat(first)), dict(_flat(second))
    names = dict.fromkeys([*first, *second])
    pairs = (Difference(name, first.get(name, NOTHING), second.get(name, NOTHING)) for name in names)
    return [each for each in pairs if each.first != each.second]


def _flat(values: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    line = " ".join(text.split())
    return line if len(line) <= 80 else f"{line[:79]}…"
