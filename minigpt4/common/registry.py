"""Classes by the names that YAML files use, in one table for each kind.

A class registers itself where it is defined::

    @registry.register_model("mini_gpt4")
    class MiniGPT4(BaseModel): ...

and is looked up by name. The look-up first imports the package with our classes of that kind, so importing this module
costs nothing::

    registry.get_model_class("mini_gpt4")
"""

import difflib
import importlib
from collections.abc import Callable, Mapping
from functools import partialmethod
from pathlib import Path

from minigpt4 import PACKAGE_ROOT

# kind -> the package or module whose import registers the classes of that kind
HOMES = {
    "builder": "minigpt4.datasets.builders",
    "task": "minigpt4.tasks",
    "model": "minigpt4.models.later_release",
    "processor": "minigpt4.processors",
    "lr_scheduler": "minigpt4.common.optims",
    "runner": "minigpt4.runners",
    "tracker": "minigpt4.tracking.trackers",
    "step": "minigpt4.fast.training_step",
    "llm_file": "minigpt4.weights.gguf",
    "projector": "minigpt4.models.projectors",
    "adapters": "minigpt4.models.lora",
    "trained_parts": "minigpt4.common.trained_parts",
    "eval_task": "minigpt4.evaluation",
    "scorer": "minigpt4.evaluation.scorer",
}


def did_you_mean(name: str, known) -> str:
    """`" Did you mean 'x'?"` when `name` resembles one of `known`, otherwise an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def default_yaml(paths: Mapping[str, str], name: str, what: str) -> Path:
    """The default YAML under `name`; `paths` are absolute or relative to the package.

    what: the beginning of the message of the KeyError for an unknown name, which lists the known ones.
    """
    if name not in paths:
        raise KeyError(f"{what} {name!r}.{did_you_mean(name, paths)} Known: {', '.join(paths)}.")
    return PACKAGE_ROOT / paths[name]


class UnknownNameError(KeyError):
    """A name under which nothing is registered."""

    def __str__(self) -> str:
        return self.args[0]  # KeyError would show it in quotes


class RegistrationError(KeyError):
    """A class that cannot be registered."""

    __str__ = UnknownNameError.__str__


class Registry:
    """Tables of classes by kind and name, and of paths by name."""

    def __init__(self) -> None:
        self._classes: dict[str, dict[str, type]] = {kind: {} for kind in HOMES}
        self._paths: dict[str, str] = {}

    def register(self, kind: str, name: str) -> Callable[[type], type]:
        """Class decorator: register the class under `name`.

        Raises RegistrationError, a KeyError, if another class has that name, and for anything that is no class.
        """
        if not isinstance(name, str) or not name:
            what = getattr(name, "__qualname__", repr(name))
            raise RegistrationError(
                f'{what}: @registry.register_{kind} needs a name, as in @registry.register_{kind}("mine").'
            )

        def decorator(cls: type) -> type:
            if not isinstance(cls, type):
                what = getattr(cls, "__qualname__", repr(cls))
                raise RegistrationError(f"{kind} {name!r}: {what} is no class, but {type(cls).__name__}.")
            owner = self._classes[kind].setdefault(name, cls)
            # The same definition may come twice, if a notebook cell is run again or a module is reloaded.
            if (owner.__module__, owner.__qualname__) != (cls.__module__, cls.__qualname__):
                raise RegistrationError(
                    f"{kind} {name!r} is already registered by {owner.__module__}.{owner.__qualname__}; "
                    f"give {cls.__module__}.{cls.__qualname__} another name."
                )
            self._classes[kind][name] = cls
            return cls

        return decorator

    def get(self, kind: str, name: str) -> type:
        """The class registered under `name`. Raises UnknownNameError, a KeyError, that lists the known names."""
        importlib.import_module(HOMES[kind])
        table = self._classes[kind]
        if name not in table:
            raise UnknownNameError(
                f"Unknown {kind} {name!r}.{did_you_mean(name, table)} Known: {', '.join(sorted(table))}. "
                "A plug-in is loaded with --import my.module or run.imports: [my.module]."
            )
        return table[name]

    def names(self, kind: str) -> list[str]:
        """All registered names of a kind, sorted."""
        importlib.import_module(HOMES[kind])
        return sorted(self._classes[kind])

    def register_path(self, name: str, path: str) -> None:
        """Register `path` under `name`. Raises KeyError if the name stands for another path."""
        if self._paths.setdefault(name, path) != path:
            raise KeyError(f"Path {name!r} is already registered as {self._paths[name]!r}.")

    def get_path(self, name: str) -> str:
        """The path registered under `name`. Raises KeyError that lists the known names."""
        if name not in self._paths:
            raise KeyError(f"Unknown path {name!r}.{did_you_mean(name, self._paths)} Known: {', '.join(self._paths)}.")
        return self._paths[name]

    # The names that LAVIS plug-ins use.
    register_builder = partialmethod(register, "builder")
    register_task = partialmethod(register, "task")
    register_model = partialmethod(register, "model")
    register_processor = partialmethod(register, "processor")
    register_lr_scheduler = partialmethod(register, "lr_scheduler")
    register_runner = partialmethod(register, "runner")
    register_projector = partialmethod(register, "projector")

    get_builder_class = partialmethod(get, "builder")
    get_task_class = partialmethod(get, "task")
    get_model_class = partialmethod(get, "model")
    get_processor_class = partialmethod(get, "processor")
    get_lr_scheduler_class = partialmethod(get, "lr_scheduler")
    get_runner_class = partialmethod(get, "runner")

    list_builders = partialmethod(names, "builder")
    list_tasks = partialmethod(names, "task")
    list_models = partialmethod(names, "model")
    list_processors = partialmethod(names, "processor")
    list_lr_schedulers = partialmethod(names, "lr_scheduler")
    list_runners = partialmethod(names, "runner")


registry = Registry()
registry.register_path("library_root", str(PACKAGE_ROOT))
registry.register_path("repo_root", str(PACKAGE_ROOT.parent))
