"""Replacements of modules and names of the first releases that are gone, listed in `assets/first_release.yaml`.

This module is the last of Python's finders, so it is asked only for a module that no other has found.
"""

import sys
from collections.abc import Callable
from functools import cache

from minigpt4 import PACKAGE_ROOT

PAGE = "docs/from_the_first_release.md"


@cache
def gone() -> dict[str, str]:
    """{name that is gone: what to use now}."""
    import yaml

    places = yaml.safe_load((PACKAGE_ROOT / "assets/first_release.yaml").read_text(encoding="utf-8"))
    return {f"{place}.{name}": now for place, names in places.items() for name, now in names.items()}


def find_spec(name: str, path: object = None, target: object = None) -> None:
    """The method of a finder. Raises ImportError for a name that is gone; finds nothing."""
    if name.startswith("minigpt4.") and name in gone():
        # Not a ModuleNotFoundError, which `from package import name` would replace by a message of its own.
        raise ImportError(f"{name} is of an earlier release. Now: {gone()[name]}. More: {PAGE}", name=name)


sys.meta_path.append(sys.modules[__name__])


def attributes_of(module: str) -> Callable[[str], None]:
    """The `__getattr__` of a module that has lost names."""

    def __getattr__(name: str) -> None:
        find_spec(f"{module}.{name}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__
