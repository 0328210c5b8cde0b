"""Names in YAML become classes here: one table for each kind of thing.

A class registers itself where it is defined::

    @registry.register_model("mini_gpt4")
    class MiniGPT4(BaseModel): ...

and is looked up by name, which first imports the package where the classes of that kind live, so that importing this
module costs nothing::

    registry.get_model_class("mini_gpt4")
"""

import difflib
import importlib
from collections.abc import Callable

# kind -> the package or module whose import registers the classes of that kind
HOMES = {
    "builder": "minigpt4.datasets.builders",
    "task": "minigpt4.tasks",
    "model": "minigpt4.models",
    "processor": "minigpt4.processors",
    "lr_scheduler": "minigpt4.common.optims",
    "runner": "minigpt4.runners",
    "step": "minigpt4.fast.training_step",
}


def did_you_mean(name: str, known) -> str:
    """`" Did you mean 'x'?"` when `name` resembles one of `known`, otherwise an empty string."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


class UnknownNameError(KeyError):
    """A name that nothing is registered under."""

    def __str__(self) -> str:
        return self.args[0]  # KeyError would show it in quotes


class Registry:
    """Tables of classes by kind and name, and of paths by name."""

    def __init__(self) -> None:
        self._classes: dict[str, dict[str, type]] = {kind: {} for kind in HOMES}
        self._paths: dict[str, str] = {}

    def register(self, kind: str, name: str) -> Callable[[type], type]:
        """Class decorator: file the class under `name`. Raises KeyError if another class already has that name."""

        def decorator(cls: type) -> type:
            owner = self._classes[kind].setdefault(name, cls)
            # The same definition may arrive twice, when a notebook cell is run again or a module reloaded.
            if (owner.__module__, owner.__qualname__) != (cls.__module__, cls.__qualname__):
                raise KeyError(
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

    def registered(self, kind: str) -> list[str]:
        """The names of a kind so far, sorted: those of modules that something has imported, plug-ins among them."""
        return sorted(self._classes[kind])

    def register_path(self, name: str, path: str) -> None:
        """Remember `path` under `name`. Raises KeyError if the name stands for another path."""
        if self._paths.setdefault(name, path) != path:
            raise KeyError(f"Path {name!r} is already registered as {self._paths[name]!r}.")

    def get_path(self, name: str) -> str:
        """The path registered under `name`. Raises KeyError that lists the known names."""
        if name not in self._paths:
            raise KeyError(f"Unknown path {name!r}.{did_you_mean(name, self._paths)} Known: {', '.join(self._paths)}.")
        return self._paths[name]

    # The names that LAVIS plug-ins use.

    def register_builder(self, name: str):
        return self.register("builder", name)

    def register_task(self, name: str):
        return self.register("task", name)

    def register_model(self, name: str):
        return self.register("model", name)

    def register_processor(self, name: str):
        return self.register("processor", name)

    def register_lr_scheduler(self, name: str):
        return self.register("lr_scheduler", name)

    def register_runner(self, name: str):
        return self.register("runner", name)

    def register_step(self, name: str):
        return self.register("step", name)

    def get_builder_class(self, name: str) -> type:
        return self.get("builder", name)

    def get_task_class(self, name: str) -> type:
        return self.get("task", name)

    def get_model_class(self, name: str) -> type:
        return self.get("model", name)

    def get_processor_class(self, name: str) -> type:
        return self.get("processor", name)

    def get_lr_scheduler_class(self, name: str) -> type:
        return self.get("lr_scheduler", name)

    def get_runner_class(self, name: str) -> type:
        return self.get("runner", name)

    def get_step_class(self, name: str) -> type:
        return self.get("step", name)

    def list_builders(self) -> list[str]:
        return self.names("builder")

    def list_tasks(self) -> list[str]:
        return self.names("task")

    def list_models(self) -> list[str]:
        return self.names("model")

    def list_processors(self) -> list[str]:
        return self.names("processor")

    def list_lr_schedulers(self) -> list[str]:
        return self.names("lr_scheduler")

    def list_runners(self) -> list[str]:
        return self.names("runner")

    def list_steps(self) -> list[str]:
        return self.names("step")


registry = Registry()
