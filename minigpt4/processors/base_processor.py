"""The base class of processors: callables whose settings may come from a YAML section."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from minigpt4.common.errors import check_names


class BaseProcessor:
    """A processor that changes nothing. Subclasses set `transform` or override `__call__`.

    The keys of its YAML section are the arguments of its `__init__`. `common.contracts.Processor` describes the calls.
    """

    transform: Callable[[Any], Any] | None = None

    def __call__(self, item: Any) -> Any:
        return item if self.transform is None else self.transform(item)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> "BaseProcessor":
        """Build the processor from its YAML section (a mapping, or None for all defaults).

        The key `name`, which selected the class, is ignored. Raises ConfigError for a key that `__init__` lacks.
        """
        settings = dict(cfg or {})
        name = settings.pop("name", None) or cls.__name__
        known = inspect.signature(cls).parameters
        check_names(settings, known, lambda key: f"Processor {name!r} has no key {key!r}")
        return cls(**settings)
