"""From YAML to checked, typed settings. Merge order, later wins:

1. `configs/default.yaml`;
2. the model's default YAML, chosen by `model.arch` and `model.model_type`;
3. each dataset's default YAML, chosen by its name;
4. the user's file;
5. `--options key=value …`.
"""

import importlib
import json
import logging
import re
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common.registry import did_you_mean, registry
from minigpt4.common.schema import DatasetConfig, EnvConfig, MiniGPT4Config, PreprocessConfig, RunConfig

PACKAGE_ROOT = Path(__file__).resolve().parents[1]
CONFIGS = PACKAGE_ROOT / "configs"
SECTIONS = {
    "run": RunConfig,
    "model": MiniGPT4Config,
    "datasets": None,
    "preprocess": PreprocessConfig,
    "env": EnvConfig,
}
# Keys whose value is a path; all may also be a URL, and llama_model a hub id.
PATH_KEYS = (
    "model.llama_model",
    "model.vit_weights",
    "model.q_former_model",
    "model.ckpt",
    "model.prompt_path",
    "run.resume_ckpt_path",
)

# `${package:assets/tiny/llama}` is a file that ships with the package, wherever that is installed.
OmegaConf.register_resolver("package", lambda path: str(PACKAGE_ROOT / path), replace=True)


class ConfigError(ValueError):
    """A mistake in a YAML file or in `--options`; the message names the key, where it stands, and the fix."""


class Config:
    """The merged settings of a run.

    Args:
        args: has `cfg_path` (the user's YAML) and `options` (a list of "key=value", or None); `imports`, a list of
            modules to import first, is optional.

    Raises:
        ConfigError: unknown key, wrong type, unreadable file, malformed option.
    """

    def __init__(self, args):
        user = load_yaml(args.cfg_path)
        options = parse_options(args.options or [])
        request = OmegaConf.merge(user, options)
        for section in request:
            if not isinstance(request[section], DictConfig):
                raise ConfigError(f"{section} in {args.cfg_path} must be a mapping, not {request[section]!r}.")
        import_plugins([*(OmegaConf.select(request, "run.imports") or []), *(getattr(args, "imports", None) or [])])

        # (where, settings), in merge order; kept to be able to say where a value comes from.
        self._sources = [
            (CONFIGS / "default.yaml", load_yaml(CONFIGS / "default.yaml")),
            *default_sources(request),
            (args.cfg_path, user),
            ("--options", options),
        ]
        merged = OmegaConf.merge(*(source for _, source in self._sources))
        self._check_names("", merged, SECTIONS)
        self.run_cfg = self._typed("run", merged, self._schema("task", merged, "run.task", RunConfig))
        self.model_cfg = self._typed("model", merged, self._schema("model", merged, "model.arch", MiniGPT4Config))
        self.env_cfg = self._typed("env", merged, EnvConfig)
        self.preprocess_cfg = self._typed("preprocess", merged, PreprocessConfig)
        self.datasets_cfg = OmegaConf.create(
            {name: self._typed(f"datasets.{name}", merged, DatasetConfig) for name in merged.get("datasets") or {}}
        )
        for dataset in self.datasets_cfg.values():
            for kind in ("vis_processor", "text_processor"):
                dataset[kind] = dataset[kind] or self.preprocess_cfg[kind]

    def origin(self, key: str) -> str:
        """The file, or `--options`, that set `key` last."""
        for where, source in reversed(self._sources):
            if _sets(source, key):
                return str(where)
        return "the built-in default"

    def check_paths(self) -> None:
        """Raise a ConfigError that lists every path of the config that does not exist."""
        missing = []
        for key in PATH_KEYS:
            section, name = key.split(".")
            value = getattr(self, f"{section}_cfg").get(name)
            if not value or _exists(value) or (key == "model.llama_model" and _is_hub_id(value)):
                continue
            if key == "model.vit_weights" and value == "published":
                continue
            missing.append(
                f"  {key} = {value!r} (set in {self.origin(key)}) does not exist. "
                f"Change it there, or on the command line: --options {key}=/where/it/is"
            )
        if missing:
            raise ConfigError("Paths that do not exist:\n" + "\n".join(missing))

    def to_dict(self) -> dict:
        """All settings as plain containers, interpolations resolved."""
        sections = {"run": self.run_cfg, "model": self.model_cfg, "datasets": self.datasets_cfg}
        sections |= {"preprocess": self.preprocess_cfg, "env": self.env_cfg}
        return {name: OmegaConf.to_container(section, resolve=True) for name, section in sections.items()}

    def pretty_print(self) -> None:
        """Log the settings, section by section."""
        settings = self.to_dict()
        logging.info("\n=====  Running Parameters    =====")
        logging.info(json.dumps(settings["run"], indent=4, sort_keys=True))
        logging.info("\n======  Dataset Attributes  ======")
        for name, dataset in settings["datasets"].items():
            logging.info("\n======== %s =======", name)
            logging.info(json.dumps(dataset, indent=4, sort_keys=True))
        logging.info("\n======  Model Attributes  ======")
        logging.info(json.dumps(settings["model"], indent=4, sort_keys=True))

    @staticmethod
    def _schema(kind: str, merged: DictConfig, key: str, builtin: type) -> type | None:
        """The dataclass of a section: ours, or that of the plug-in named at `key` (None: it declares no keys)."""
        default = getattr(builtin, key.split(".")[1])
        name = OmegaConf.select(merged, key) or default
        if name == default:
            return builtin
        try:
            plugin = registry.get(kind, name)
        except KeyError as error:
            raise ConfigError(f"{key}: {error.args[0]}") from None
        return getattr(plugin, "config_class", builtin if kind == "task" else None)

    def _typed(self, section: str, merged: DictConfig, schema: type | None) -> DictConfig:
        """The section checked against its dataclass, defaults filled in."""
        values = OmegaConf.select(merged, section) or OmegaConf.create({})
        if schema is None:
            return values
        self._check_names(f"{section}.", values, [f.name for f in fields(schema)])
        try:
            typed = OmegaConf.merge(OmegaConf.structured(schema), values)
            OmegaConf.resolve(typed)
        except OmegaConfBaseException as error:
            raise self._type_error(section, schema, error) from None
        for field in fields(schema):
            if "keys" in field.metadata and isinstance(typed[field.name], DictConfig):
                self._check_names(f"{section}.{field.name}.", typed[field.name], field.metadata["keys"])
        return typed

    def _type_error(self, section: str, schema: type, error: OmegaConfBaseException) -> ConfigError:
        name = (getattr(error, "full_key", None) or "").split(".")[0].split("[")[0]
        hints = get_type_hints(schema)
        if name not in hints:
            return ConfigError(f"{section} (set in {self.origin(section)}): {str(error).splitlines()[0]}")
        hint = hints[name]
        key, expected = f"{section}.{name}", hint.__name__ if type(hint) is type else hint
        value = next((s for _, s in reversed(self._sources) if _sets(s, key)), {})
        value = OmegaConf.select(value, key)
        return ConfigError(f"{key} = {value!r} (set in {self.origin(key)}) is not of type {expected}.")

    def _check_names(self, prefix: str, values: DictConfig, known) -> None:
        for name in values:
            if name not in known:
                key = f"{prefix}{name}"
                raise ConfigError(
                    f"Unknown key {key} in {self.origin(key)}.{did_you_mean(name, known)} "
                    f"Known keys: {', '.join(sorted(known))}."
                )


def load_yaml(path: str | Path) -> DictConfig:
    """Read a YAML file whose top level is a mapping. Raises ConfigError that names the file."""
    try:
        loaded = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"Cannot read {path}: {error.strerror}. Give the YAML file with --cfg-path.") from None
    except Exception as error:  # yaml's own errors share no base class that is public
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} must hold a mapping with sections such as run: and model:.")
    return loaded


def parse_options(options: list[str]) -> DictConfig:
    """`["run.batch_size_train=8", …]` as a nested config. Raises ConfigError for an item without key or value."""
    parsed = OmegaConf.create({})
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][\w-]*(\.[\w-]+)+", key):
            raise ConfigError(f"--options {option!r} is not of the form section.key=value, as in run.init_lr=1e-4.")
        if not text:
            raise ConfigError(f"--options {option!r} has no value. Write {key}=null to unset it, or {key}='\"\"'.")
        OmegaConf.update(parsed, key, _option_value(text, key), force_add=True)
    return parsed


def _option_value(text: str, key: str):
    """Numbers, booleans, null, quoted text, [lists] and {mappings} are YAML; anything else is the text itself.

    Plain YAML would drop what follows a `#`, read `Human: {}` as a mapping and strip spaces, all of which occur in
    prompt templates.
    """
    if text.startswith("#"):
        return text
    try:
        value = OmegaConf.create(f"value: {text}")
        value = OmegaConf.to_container(value, resolve=False)["value"]
    except Exception as error:  # yaml's own errors share no base class that is public
        if text[0] in "[{\"'":
            raise ConfigError(f"--options {key}={text} is not valid YAML: {error}") from None
        return text
    structured = text[0] in "[{\"'"
    return value if structured or not isinstance(value, (str, dict, list)) else text


def import_plugins(modules: list[str]) -> None:
    """Import modules that register plug-ins. Raises ConfigError when one cannot be found."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            hint = " Is its folder on PYTHONPATH?" if error.name and module.startswith(error.name) else ""
            raise ConfigError(f"Cannot import {module!r} (--import, run.imports): {error}.{hint}") from error


def default_sources(request: DictConfig) -> list[tuple[Path, DictConfig]]:
    """The default YAMLs that a request (the user's file and options) calls for: the model's, then the datasets'."""
    sources = []
    model = request.get("model") or {}
    if model:
        arch = model.get("arch") or MiniGPT4Config.arch
        sources.append(_model_default(arch, model.get("model_type") or MiniGPT4Config.model_type))
    for name, dataset in (request.get("datasets") or {}).items():
        sources += _dataset_default(name, (dataset or {}).get("type", "default"))
    return [(path, load_yaml(path)) for path in sources if path]


def _model_default(arch: str, model_type: str) -> Path | None:
    """The shipped YAML with this arch and model_type, or the one a plug-in's class names."""
    types = {}
    for path in sorted(CONFIGS.glob("models/*.yaml")):
        model = load_yaml(path).model
        if model.arch == arch:
            types[model.get("model_type", MiniGPT4Config.model_type)] = path
    if not types:
        try:
            model = registry.get_model_class(arch)
            return model.default_config_path(model_type) if model.PRETRAINED_MODEL_CONFIG_DICT else None
        except KeyError as error:
            raise ConfigError(f"model.arch: {error.args[0]}") from None
    if model_type not in types:
        raise ConfigError(
            f"model.model_type={model_type!r} is not known for {arch}.{did_you_mean(model_type, types)} "
            f"Known: {', '.join(sorted(types))}."
        )
    return types[model_type]


def _dataset_default(name: str, config_type: str) -> list[Path]:
    """The shipped YAML that describes this dataset, or the one a plug-in's builder names."""
    shipped = [p for p in sorted(CONFIGS.glob("datasets/*/*.yaml")) if name in load_yaml(p).datasets]
    if shipped:
        return shipped
    try:
        path = registry.get_builder_class(name).default_config_path(config_type)
    except KeyError as error:
        raise ConfigError(f"datasets.{name}: {error.args[0]}") from None
    return [path] if path else []


def _sets(source: DictConfig, key: str) -> bool:
    """Whether a source has `key`, be its value null."""
    section, _, name = key.rpartition(".")
    parent = OmegaConf.select(source, section) if section else source
    return isinstance(parent, DictConfig) and name in parent


def _exists(value: str) -> bool:
    return "://" in value or Path(value).expanduser().exists()


def _is_hub_id(value: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", value) is not None
