"""Sources of settings: YAML files, and the default files that belong to a request."""

import importlib
import re
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from minigpt4 import PACKAGE_ROOT
from minigpt4.common import typography
from minigpt4.common.errors import ConfigError, check_names
from minigpt4.common.registry import RegistrationError, registry
from minigpt4.common.schema import MiniGPT4Config
from minigpt4.common.text import encoding_of

CONFIGS = PACKAGE_ROOT / "configs"
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")  # YAML refuses them without naming the line

# `${package:assets/tiny/llama}` is a file in the installed package.
OmegaConf.register_resolver("package", lambda path: str(PACKAGE_ROOT / path), replace=True)


def load_yaml(path: str | Path) -> DictConfig:
    """Read a YAML file whose sections are mappings. Raises ConfigError that names the file, and the line if it can."""
    text = _read_text(path)
    try:
        loaded = OmegaConf.load(StringIO(text))
        slip, advice = typography.slip_in_yaml(text), ". If this text is meant, put it in quotes."
    except Exception as error:  # the errors of yaml and OmegaConf share no base class
        mark = getattr(error, "problem_mark", None)
        slip, advice = typography.slip_before(text, mark.line + 1) if mark else None, "."
        if slip is None:
            raise ConfigError(f"{path} is not valid YAML{_described(error)}") from None
    if slip:
        raise ConfigError(f"{path}, line {slip.line}: {slip}{advice}")
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} must hold a mapping with sections such as run: and model:.")
    return with_sections(loaded, path)


def _read_text(path: str | Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}. Give the YAML file with --cfg-path.") from None
    try:
        text = content.decode(encoding_of(content)).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line, byte = content[: error.start].count(b"\n") + 1, content[error.start]
        raise ConfigError(
            f"{path}, line {line}: the byte 0x{byte:02x} is not UTF-8. Save the file in UTF-8, in the editor or with "
            "iconv (Chinese Windows: iconv -f GBK -t UTF-8 OLD > NEW)."
        ) from None
    if control := CONTROL.search(text):
        line = text[: control.start()].count("\n") + 1
        raise ConfigError(f"{path}, line {line}: the control character U+{ord(control[0]):04X}. Delete it.")
    return text


def _described(error: Exception) -> str:
    """The end of a message about an error of yaml."""
    mark, context = getattr(error, "problem_mark", None), getattr(error, "context_mark", None)
    if mark is None:
        return f": {error}"
    began = f" ({error.context}, from line {context.line + 1} on)" if context else ""
    message = f", line {mark.line + 1}, column {mark.column + 1}: {error.problem}{began}."
    if error.problem.startswith(("mapping values", "did not find expected key")):
        message += " Compare the spaces at the beginning of this line and its neighbours."
    return message


def with_sections(source: DictConfig, where: str | Path) -> DictConfig:
    """The source with empty sections (`run:` and nothing below) as empty mappings.

    Raises ConfigError for anything else in their place, and for keys that YAML reads as something else than text.
    """
    for prefix, parent in (("", source), ("datasets.", source.get("datasets") or {})):
        _check_keys(prefix, parent, where)
        for name in parent:
            if parent[name] is None:
                parent[name] = {}
            if not isinstance(parent[name], DictConfig):
                raise ConfigError(f"{prefix}{name} in {where} must be a mapping, not {parent[name]!r}.")
            _check_keys(f"{prefix}{name}.", parent[name], where)
    return source


def _check_keys(prefix: str, section: DictConfig, where: str | Path) -> None:
    for key in section:
        if not isinstance(key, str):
            raise ConfigError(
                f"{prefix}{key} in {where}: the key {key!r} is not a text. Correct it, or put quotes around it."
            )


def text_at(settings: DictConfig, key: str) -> str | None:
    """The text at a key. Raises ConfigError for anything else."""
    value = OmegaConf.select(settings, key)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{key} = {value!r} is not a text.")
    return value


def merge(*sources: tuple[str | Path, DictConfig]) -> DictConfig:
    """The settings of all sources, each with its name; later ones win. Raises ConfigError where kinds differ."""
    try:
        return OmegaConf.merge(*(source for _, source in sources))
    except TypeError:
        merged: dict = {}
        for where, source in sources:
            if found := conflict(merged, values := OmegaConf.to_container(source)):
                key, value = found
                raise ConfigError(f"{key} = {value!r} (set in {where}) must be {other_kind(value)}.") from None
            merged = OmegaConf.to_container(OmegaConf.merge(merged, values))
        raise


def other_kind(value: dict | list) -> str:
    return "a mapping" if isinstance(value, list) else "a list"


def conflict(ours: dict, theirs: dict) -> tuple[str, Any] | tuple[()]:
    """The first key where one has a list and the other a mapping, and its value in the second."""
    for name in ours.keys() & theirs.keys():
        pair = ours[name], theirs[name]
        if {type(each) for each in pair} == {dict, list}:
            return name, pair[1]
        if all(isinstance(each, dict) for each in pair) and (found := conflict(*pair)):
            return f"{name}.{found[0]}", found[1]
    return ()


def import_plugins(modules: list[str]) -> None:
    """Import modules that register plug-ins.

    Raises ConfigError if one cannot be found or registered, or is not named as a module.
    """
    for module in modules:
        if not re.fullmatch(r"[^\s./\\]+(\.(?!py$)[^\s./\\]+)*", module if isinstance(module, str) else ""):
            raise ConfigError(
                f"{module!r} (--import, run.imports) is not the name of a module. Put the folder of the file on "
                "PYTHONPATH, and give the name without .py: my_plugin for my_plugin.py."
            )
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            hint = " Is its folder on PYTHONPATH?" if error.name and module.startswith(error.name) else ""
            raise ConfigError(f"Cannot import {module!r} (--import, run.imports): {error}.{hint}") from error
        except RegistrationError as error:
            raise ConfigError(f"Cannot import {module!r} (--import, run.imports): {error}") from error


def default_sources(request: DictConfig) -> list[tuple[Path, DictConfig]]:
    """The default YAMLs for a request (the user's file and options): the model's, then the datasets'.

    They are shipped, or those that a plug-in's class names.
    """
    arch = text_at(request, "model.arch") or MiniGPT4Config.arch
    model_type = text_at(request, "model.model_type") or MiniGPT4Config.model_type
    if types := _shipped_models(arch):
        check_names([model_type], types, lambda name: f"model.model_type={name!r} is not known for {arch}")
        sources = [types[model_type]]
    else:
        sources = [_default_of_plugin("model", arch, model_type, "model.arch")]
    found = [(path, load_yaml(path)) for path in sources if path]
    for name in request.get("datasets") or {}:
        builder, kind = builder_name(request, name), text_at(request, f"datasets.{name}.type") or "default"
        # A dataset of one's own has a name that no builder has.
        key = f"datasets.{name}.builder" if builder != name else f"datasets.{name} (without builder: conversation)"
        path = shipped_datasets().get(builder) or _default_of_plugin("builder", builder, kind, key)
        if path:
            defaults = load_yaml(path)
            if name != builder and builder in defaults.get("datasets", {}):
                defaults = OmegaConf.create({"datasets": {name: defaults.datasets[builder]}})
            found.append((path, defaults))
    return found


def builder_name(settings: DictConfig, dataset: str) -> str:
    """The registered name of a dataset's builder: the key `builder` of its section, or the dataset's own name."""
    return text_at(settings, f"datasets.{dataset}.builder") or dataset


def _shipped_models(arch: str) -> dict[str, Path]:
    """{model_type: default YAML} of the models of this arch that come with the package."""
    models = {path: load_yaml(path).model for path in sorted(CONFIGS.glob("models/*.yaml"))}
    return {model.model_type: path for path, model in models.items() if model.arch == arch}


@cache
def shipped_datasets() -> dict[str, Path]:
    """{name: default YAML} of the datasets that come with the package."""
    return {name: path for path in sorted(CONFIGS.glob("datasets/*/*.yaml")) for name in load_yaml(path).datasets}


def _default_of_plugin(kind: str, name: str, type_name: str, key: str) -> str | Path | None:
    """The default YAML that the class registered under `name` has for a model_type, or a dataset's type."""
    try:
        registered = registry.get(kind, name)
        if kind == "model" and not registered.PRETRAINED_MODEL_CONFIG_DICT:
            return None
        return registered.default_config_path(type_name)
    except KeyError as error:
        raise ConfigError(f"{key}: {error.args[0]}") from None
