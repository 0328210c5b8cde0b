"""From YAML to checked, typed settings. Merge order, later wins:

1. `configs/default.yaml`;
2. the model's default YAML, chosen by `model.arch` and `model.model_type`;
3. each dataset's default YAML, chosen by its name;
4. the user's file;
5. `--options key=value …`.
"""

import json
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common import facts
from minigpt4.common.config_files import (
    CONFIGS,
    default_sources,
    import_plugins,
    load_yaml,
    parse_options,
    shipped_datasets,
)
from minigpt4.common.errors import ConfigError, check_names
from minigpt4.common.registry import did_you_mean, registry
from minigpt4.common.schema import DatasetConfig, EnvConfig, MiniGPT4Config, PreprocessConfig, RunConfig

SECTIONS = ("run", "model", "datasets", "preprocess", "env")
# Keys whose value is a path or URL. prompt_path takes no URL; llama_model takes a hub id instead of one.
PATH_KEYS = (
    "model.llama_model",
    "model.vit_weights",
    "model.q_former_model",
    "model.ckpt",
    "model.prompt_path",
    "run.resume_ckpt_path",
)


class Config:
    """The merged settings of a run.

    Args:
        args: has `cfg_path` (the user's YAML) and `options` (a list of "key=value", or None). Optional: `imports`, a
            list of modules to import first, and `offline`, True to fetch nothing.

    Raises:
        ConfigError: unknown key, wrong type, unreadable file, malformed option.
    """

    def __init__(self, args):
        if getattr(args, "offline", False):
            facts.go_offline()
        user, options = load_yaml(args.cfg_path), parse_options(args.options or [])
        request = OmegaConf.merge(user, options)
        imports = OmegaConf.select(request, "run.imports") or []
        if isinstance(imports, str):
            raise ConfigError(f"run.imports = {imports!r} must be a list of modules, as in [{imports}].")
        import_plugins([*imports, *(getattr(args, "imports", None) or [])])

        # (where, settings), in merge order; `origin` finds the source of a value here.
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
        self.datasets_cfg = OmegaConf.create({name: self._dataset(name, merged) for name in merged.get("datasets", {})})
        for key in PATH_KEYS:
            section, name = key.split(".")
            cfg = getattr(self, f"{section}_cfg")
            if str(cfg.get(name)).startswith("~"):
                cfg[name] = str(Path(cfg[name]).expanduser())

    def origin(self, key: str) -> str:
        """The file, or `--options`, that set `key` last."""
        return next((str(where) for where, source in reversed(self._sources) if _sets(source, key)), "the defaults")

    def check_paths(self, datasets: bool = False, keys: Sequence[str] = PATH_KEYS) -> None:
        """Raise a ConfigError that lists every path at `keys` (and of `datasets`) that does not exist."""
        missing = [f"  {key} = {what}. {fix}" for key, what, fix in self.missing_paths(datasets, keys)]
        if missing:
            raise ConfigError("Paths that do not exist:\n" + "\n".join(missing))

    def missing_paths(self, datasets: bool, keys: Sequence[str] = PATH_KEYS) -> Iterator[tuple[str, str, str]]:
        """(key, what is wrong, how to mend it) of every path that does not exist."""
        for key, value in [*self._paths(keys), *(self._storages() if datasets else [])]:
            if not _exists(value, key):
                fix = f"Change it there, or on the command line: --options {key}=/where/it/is"
                wrong = "is a pipe or a device" if Path(value).expanduser().exists() else "does not exist"
                yield key, f"{value!r} (set in {self.origin(key)}) {wrong}", fix

    def _paths(self, keys: Sequence[str]) -> Iterator[tuple[str, str]]:
        """(key, value) of the paths of the model and the run."""
        for key in keys:
            section, name = key.split(".")
            value = getattr(self, f"{section}_cfg").get(name)
            if value and (key, value) != ("model.vit_weights", "published"):
                yield key, value

    def _storages(self) -> Iterator[tuple[str, str]]:
        """(key, value) of the shards, folders and caches of shipped datasets; a plug-in checks its own."""
        for name in self.datasets_cfg.keys() & shipped_datasets().keys():
            build_info = self.datasets_cfg[name].build_info
            key = "features" if facts.cached_features(self.datasets_cfg[name]) else "storage"
            values = build_info.get(key)
            for value in [values] if isinstance(values, str) else values or []:
                yield f"datasets.{name}.build_info.{key}", value

    def to_dict(self) -> dict:
        """All settings as plain containers, interpolations resolved."""
        sections = {name: getattr(self, f"{name}_cfg") for name in SECTIONS}
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
        """The dataclass of a section: ours, or that of the plug-in named at `key` (None: any key is accepted)."""
        default = getattr(builtin, key.split(".")[1])
        name = OmegaConf.select(merged, key) or default
        if name == default:
            return builtin
        try:
            plugin = registry.get(kind, name)
        except KeyError as error:
            raise ConfigError(f"{key}: {error.args[0]}") from None
        # A plug-in task may have no keys of its own; a plug-in model without `config_class` may have any.
        return getattr(plugin, "config_class", None) or (builtin if kind == "task" else None)

    def _dataset(self, name: str, merged: DictConfig) -> DictConfig:
        """A section `datasets.<name>`. Splits without a processor get that of `preprocess`."""
        if name in shipped_datasets():
            schema = DatasetConfig
        else:
            schema = getattr(registry.get_builder_class(name), "config_class", None)
        dataset = self._typed(f"datasets.{name}", merged, schema)
        if schema is None:
            dataset = OmegaConf.merge(asdict(DatasetConfig()), dataset)
        for kind in ("vis_processor", "text_processor"):
            dataset[kind] = self.preprocess_cfg[kind] | dataset[kind]
        return dataset

    def _typed(self, section: str, merged: DictConfig, schema: type | None) -> DictConfig:
        """The section checked against its dataclass, defaults filled in."""
        values = OmegaConf.select(merged, section)
        values = OmegaConf.create({}) if values is None else values
        if schema is None:
            return values
        self._check_names(f"{section}.", values, [f.name for f in fields(schema)])
        try:
            typed = OmegaConf.merge(OmegaConf.structured(schema), values)
            OmegaConf.resolve(typed)
        except OmegaConfBaseException as error:
            raise self._type_error(section, schema, error) from None
        for field in fields(schema):
            self._check_value(f"{section}.{field.name}", typed[field.name], **field.metadata)
        return typed

    def _check_value(self, key: str, value, keys=(), choices=(), least=None) -> None:
        """Check a value against the metadata of its field in the schema."""
        if keys and isinstance(value, DictConfig):
            self._check_names(f"{key}.", value, keys)
        where = f"{key} = {value!r} (set in {self.origin(key)})"
        if choices and value is not None and value not in choices:
            raise ConfigError(f"{where} is not one of {', '.join(choices)}.{did_you_mean(value, choices)}")
        if least is not None and value is not None and value < least:
            raise ConfigError(f"{where} must be at least {least}.")

    def _type_error(self, section: str, schema: type, error: OmegaConfBaseException) -> ConfigError:
        name = (getattr(error, "full_key", None) or "").split(".")[-1].split("[")[0]
        hint = get_type_hints(schema).get(name)
        key = f"{section}.{name}"
        source = next((source for _, source in reversed(self._sources) if _sets(source, key)), None)
        if hint is None or source is None or "Interpolation" in type(error).__name__:
            return ConfigError(f"{section} (set in {self.origin(section)}): {str(error).splitlines()[0]}")
        value = OmegaConf.to_container(OmegaConf.select(source, section), resolve=False)[name]
        expected = hint.__name__ if type(hint) is type else hint
        return ConfigError(f"{key} = {value!r} (set in {self.origin(key)}) is not of type {expected}.")

    def _check_names(self, prefix: str, values: DictConfig, known: Iterable[str]) -> None:
        check_names(values, sorted(known), lambda name: f"Unknown key {prefix}{name} in {self.origin(prefix + name)}")


def _sets(source: DictConfig, key: str) -> bool:
    """Whether a source has `key`, even if its value is null."""
    section, _, name = key.rpartition(".")
    parent = OmegaConf.select(source, section) if section else source
    return isinstance(parent, DictConfig) and name in parent


def _exists(value: str, key: str) -> bool:
    """Whether the value of a path key can be used. For shards, only the folder must exist."""
    if facts.is_url(value) or value.startswith("pipe:"):
        return key not in ("model.llama_model", "model.prompt_path")
    if key == "model.llama_model" and facts.is_hub_id(value):
        return True
    path = Path(value).expanduser()
    if key.endswith("storage") and re.search(r"[{*?\[]", value):
        path = Path(re.split(r"[{*?\[]", str(path))[0] + "x").parent
    return path.is_file() or path.is_dir()  # reading a pipe might never end
