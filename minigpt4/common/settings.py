"""Dataclasses of settings: a field holds its help text and its bounds, for command lines, YAML files and the checks."""

import math
import operator
from collections.abc import Callable
from dataclasses import field, fields
from typing import Any

BOUNDS = {"at_least": operator.ge, "at_most": operator.le, "more_than": operator.gt, "less_than": operator.lt}


def setting(
    default: Any,
    text: str = "",
    *,
    choices: tuple[str, ...] = (),
    keys: type | None = None,
    kind: str = "",
    **bounds: float | str,
) -> Any:
    """A field of a dataclass.

    Args:
        default: the default, or a type that makes it (`dict`).
        text: help. A setting of a command with a text becomes a flag.
        choices: the texts that are allowed.
        keys: the dataclass of the keys of a mapping.
        kind: "path" for a text in which a backslash stays one; "texts" for a text or a list of texts, "name" for a text
            or a mapping, whose type is Any; "mappings" for a mapping of names to mappings that have these `keys`.
        bounds: `at_least`, `at_most`, `more_than`, `less_than`: a number, or the name of another field. A number with
            bounds is finite.
    """
    metadata = {"help": text, "choices": choices, "keys": keys, "kind": kind, "bounds": bounds}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def broken_bound(value: Any, bounds: dict[str, float | str], get: Callable[[str], Any]) -> str | None:
    """The bound that a value breaks, such as "must be at least 1"; None: none. NaN and infinity break any.

    get: returns another setting by its name. The value None, here and there, is within any bounds.
    """
    if value is None:
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    for name, bound in bounds.items():
        limit = get(bound) if isinstance(bound, str) else bound
        if limit is not None and not BOUNDS[name](value, limit):
            return f"must be {name.replace('_', ' ')} {bound}" + (f"={limit}" if isinstance(bound, str) else "")
    return None


def check_bounds(settings: Any) -> None:
    """Raise ValueError for a setting that is out of its bounds."""
    for each in fields(settings):
        value = getattr(settings, each.name)
        if broken := broken_bound(value, each.metadata["bounds"], lambda name: getattr(settings, name)):
            raise ValueError(f"{each.name}={value!r} {broken}.")
