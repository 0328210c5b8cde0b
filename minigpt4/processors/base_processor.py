"""The base class of processors: callables whose settings may come from a YAML section."""

import inspect
import json
from collections.abc import Callable, Mapping
from inspect import formatannotation
from typing import Any

from omegaconf import OmegaConf
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

from minigpt4.common.errors import ConfigError, check_names
from minigpt4.common.options import argument_types
from minigpt4.common.registry import UnknownNameError, registry

EXPECTED = {int: "a whole number", float: "a number", str: "a text"}


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

        The key `name`, which selected the class, is ignored. Raises ConfigError for a key that `__init__` lacks, and
        for a value that is not of the argument's type.
        """
        settings = OmegaConf.to_container(cfg, resolve=True) if OmegaConf.is_config(cfg) else dict(cfg or {})
        name = settings.pop("name", None) or cls.__name__
        known, types = inspect.signature(cls).parameters, argument_types(cls)
        check_names(settings, known, lambda key: f"Processor {name!r} has no key {key!r}")
        for key, value in settings.items():
            if key in types and (value is not None or known[key].default is not None):
                settings[key] = _converted(value, types[key], f"Processor {name!r}: {key}")
        return cls(**settings)


def _converted(value: Any, hint: Any, key: str) -> Any:
    """A value from YAML as an argument of type `hint`: a list becomes a tuple, for example. Raises ConfigError."""
    try:
        adapter, content = TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False)), json.dumps(value)
    except (PydanticUserError, TypeError):  # it cannot come from YAML
        return value
    try:
        return adapter.validate_json(content, strict=True)
    except ValidationError as error:
        reason = error.errors(include_url=False, include_context=False, include_input=False)[0]["msg"]
        expected = EXPECTED.get(hint) or f"of type {formatannotation(hint)}"
        raise ConfigError(f"{key}={value!r} must be {expected}: {reason}.") from None


def make_processor(key: str, cfg: Mapping[str, Any] | None) -> BaseProcessor:
    """The processor of the section at `key`; without one, a processor that changes nothing. Raises ConfigError."""
    cls = processor_class(key, cfg)
    try:
        return cls.from_config(cfg) if cls else BaseProcessor()
    except ConfigError as mistake:
        raise ConfigError(f"{key}: {mistake}") from None


def processor_class(key: str, cfg: Mapping[str, Any] | None) -> type | None:
    """The class of the processor of the section at `key`; None: there is none.

    Raises ConfigError if it has no name, and UnknownNameError.
    """
    if not cfg:
        return None
    if not isinstance(cfg, Mapping) or not cfg.get("name"):
        known = ", ".join(registry.list_processors())
        raise ConfigError(f"{key} has no key 'name', the processor's. Known: {known}.")
    try:
        return registry.get_processor_class(cfg["name"])
    except UnknownNameError as mistake:
        raise UnknownNameError(f"{key}.name: {mistake}") from None
