"""Dataclasses of settings. A field holds its help text and its bounds, for the command line and for the check."""

import operator
from dataclasses import field, fields
from typing import Any

BOUNDS = {"at least": operator.ge, "at most": operator.le, "more than": operator.gt}


def setting(default: Any, text: str = "", **bounds: float) -> Any:
    """A field of a dataclass. bounds: `at_least`, `at_most` and `more_than`. A setting with a text becomes a flag."""
    return field(default=default, metadata={"help": text, "bounds": bounds})


def check_bounds(settings: Any) -> None:
    """Raise ValueError for a setting that is out of its bounds. The value None is within any bounds."""
    for each in fields(settings):
        value = getattr(settings, each.name)
        for name, bound in each.metadata["bounds"].items():
            words = name.replace("_", " ")
            if value is not None and not BOUNDS[words](value, bound):
                raise ValueError(f"{each.name}={value!r} must be {words} {bound}.")
