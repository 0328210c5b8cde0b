"""Sources of settings: YAML files, `--options`, and the default files that belong to a request."""

import importlib
import re
from functools import cache
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from minigpt4 import PACKAGE_ROOT
from minigpt4.common.errors import ConfigError, check_names
from minigpt4.common.registry import registry
from minigpt4.common.schema import MiniGPT4Config

CONFIGS = PACKAGE_ROOT / "configs"

# `${package:assets/tiny/llama}` is a file in the installed package.
OmegaConf.register_resolver("package", lambda path: str(PACKAGE_ROOT / path), replace=True)


def load_yaml(path: str | Path) -> DictConfig:
    """Read a YAML file whose sections are mappings. Raises ConfigError that names the file."""
    try:
        loaded = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}. Give the YAML file with --cfg-path.") from None
    except Exception as error:  # the errors of yaml share no public base class
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} must hold a mapping with sections such as run: and model:.")
    return _with_sections(loaded, path)


def parse_options(options: list[str]) -> DictConfig:
    """`["run.batch_size_train=8", …]` as a nested config. If a key is given twice, the later value wins.

    Raises ConfigError for an item without key or value, and for shards that are given twice: a shell expands an
    unquoted `{00000..01255}` to many items, and the run would read only the last shard.
    """
    parsed, given = OmegaConf.create({}), {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)+", key):
            form = "section.key=value, without spaces around =, as in run.init_lr=1e-4"
            raise ConfigError(f"--options {option!r} is not of the form {form}.")
        if not text:
            raise ConfigError(
                f"--options {option!r} has no value. Write it after the = without a space; {key}=null unsets the key, "
                f"{key}='\"\"' empties it."
            )
        if key.endswith(".storage") and given.setdefault(key, text) != text:
            raise ConfigError(
                f"--options gives {key} more than once: {given[key]!r} and {text!r}. Give it once; put quotes around "
                f"a range, as in {key}='{{00000..01255}}.tar', or the shell expands it."
            )
        OmegaConf.update(parsed, key, _option_value(text, key), force_add=True)
    return _with_sections(parsed, "--options")


def _with_sections(source: DictConfig, where: str | Path) -> DictConfig:
    """The source with empty sections (`run:` and nothing below) as empty mappings; anything else is a ConfigError."""
    for section in source:
        if source[section] is None:
            source[section] = {}
        if not isinstance(source[section], DictConfig):
            raise ConfigError(f"{section} in {where} must be a mapping, not {source[section]!r}.")
    for name, dataset in source.get("datasets", {}).items():
        if dataset is None:
            source.datasets[name] = {}
        elif not isinstance(dataset, DictConfig):
            raise ConfigError(f"datasets.{name} in {where} must be a mapping, not {dataset!r}.")
    return source


def _option_value(text: str, key: str):
    """Numbers, booleans, null, quoted text, [lists] and {mappings} are YAML; anything else is the text itself.

    Plain YAML would drop everything after a `#`, read `Human: {}` as a mapping and strip spaces. Prompt templates
    contain all three.
    """
    if text.startswith("#") or text.isspace():
        return text
    # A brace range of shards, such as {00000..01255}.tar, is no mapping.
    structured = text[0] in "[\"'" or (text[0] == "{" and ":" in text)
    try:
        value = OmegaConf.create(f"value: {text}")
        value = OmegaConf.to_container(value, resolve=False)["value"]
    except Exception as error:  # the errors of yaml share no public base class
        if structured:
            raise ConfigError(f"--options {key}={text} is not valid YAML: {error}") from None
        return text
    return value if structured or not isinstance(value, (str, dict, list)) else text


def import_plugins(modules: list[str]) -> None:
    """Import modules that register plug-ins. Raises ConfigError if one cannot be found, or is not named as a module."""
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


def default_sources(request: DictConfig) -> list[tuple[Path, DictConfig]]:
    """The default YAMLs for a request (the user's file and options): the model's, then the datasets'.

    They are shipped, or those that a plug-in's class names.
    """
    model = request.get("model") or {}
    arch, model_type = model.get("arch") or MiniGPT4Config.arch, model.get("model_type") or MiniGPT4Config.model_type
    if types := _shipped_models(arch):
        check_names([model_type], types, lambda name: f"model.model_type={name!r} is not known for {arch}")
        sources = [types[model_type]]
    else:
        sources = [_default_of_plugin("model", arch, model_type, "model.arch")]
    for name, dataset in (request.get("datasets") or {}).items():
        path, kind = shipped_datasets().get(name), dataset.get("type", "default")
        sources.append(path or _default_of_plugin("builder", name, kind, f"datasets.{name}"))
    return [(path, load_yaml(path)) for path in sources if path]


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
