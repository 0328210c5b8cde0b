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
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from minigpt4.common import config_files, facts
from minigpt4.common.config_files import CONFIGS, builder_name, load_yaml, merge, shipped_datasets
from minigpt4.common.errors import ConfigError, check_names
from minigpt4.common.options import KeyTypes, is_text, parse_options, without_none
from minigpt4.common.registry import did_you_mean, registry
from minigpt4.common.schema import (
    AUTO,
    DatasetConfig,
    EnvConfig,
    MiniGPT4Config,
    PreprocessConfig,
    RunConfig,
    ShippedDatasetConfig,
)
from minigpt4.common.settings import broken_bound
from minigpt4.common.upstream import what_to_write

# The text processor of datasets whose captions were written by BLIP, in lower case and without punctuation.
BLIP_CAPTIONS = ("laion", "cc_sbu")
TEXT_PROCESSOR = {split: {"name": "blip_caption"} for split in ("train", "eval")}
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
        user, options = load_yaml(args.cfg_path), parse_options(args.options or [], strict=False)
        request = merge((args.cfg_path, user), ("--options", options))
        imports = OmegaConf.select(request, "run.imports") or []
        if not isinstance(imports, (list, ListConfig)) or not all(isinstance(module, str) for module in imports):
            raise ConfigError(f"run.imports = {imports!r} must be a list of modules, as in [my.module].")
        imports = list(dict.fromkeys([*imports, *(getattr(args, "imports", None) or [])]))
        config_files.import_plugins(imports)

        # (where, settings), in merge order; `origin` finds the source of a value here.
        self._sources = [
            (CONFIGS / "default.yaml", load_yaml(CONFIGS / "default.yaml")),
            *config_files.default_sources(request),
            (args.cfg_path, user),
            ("--options", options),
        ]
        merged = merge(*self._sources)
        self._check_names("", merged, SECTIONS)
        schemas = self._schemas(merged)
        if args.options:  # a second time, since the keys of plug-ins have types now
            self._sources[-1] = ("--options", parse_options(args.options, KeyTypes(schemas, merged)))
            merged = merge(*self._sources)
        typed = {name: self._typed(name, merged, schema) for name, schema in schemas.items() if "." not in name}
        self.run_cfg, self.model_cfg, self.env_cfg, self.preprocess_cfg = typed.values()
        self.run_cfg.imports = imports
        datasets = {name: self._dataset(name, merged, schemas) for name in merged.get("datasets", {})}
        self.datasets_cfg = OmegaConf.create(datasets)
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
            if not (key == "run.resume_ckpt_path" and value == AUTO) and not _exists(value, key):
                fix = f"Change it there, or on the command line: --options {key}=/where/it/is"
                wrong = "is a pipe or a device" if Path(value).expanduser().exists() else "does not exist"
                yield key, f"{value!r} (set in {self.origin(key)}) {wrong}", fix

    def _paths(self, keys: Sequence[str]) -> Iterator[tuple[str, str]]:
        """(key, value) of the paths of the model and the run."""
        for key in keys:
            section, name = key.split(".")
            value = getattr(self, f"{section}_cfg").get(name)
            # A plug-in's section may have anything here. A number is a name, as with our own keys.
            if value and isinstance(value, (str, int, float)) and not isinstance(value, bool):
                if (key, value) != ("model.vit_weights", "published"):
                    yield key, str(value)

    def _storages(self) -> Iterator[tuple[str, str]]:
        """(key, value) of the shards, folders and caches of shipped datasets; a plug-in checks its own."""
        for name in self.datasets_cfg:
            if self.builder(name) not in shipped_datasets():
                continue
            build_info = self.datasets_cfg[name].build_info
            key = "features" if facts.cached_features(self.datasets_cfg[name]) else "storage"
            values = build_info.get(key)
            for value in values if isinstance(values, Sequence) and not isinstance(values, str) else [values]:
                if value is not None:
                    yield f"datasets.{name}.build_info.{key}", str(value)

    def builder(self, dataset: str) -> str:
        """The registered name of a dataset's builder."""
        return self.datasets_cfg[dataset].get("builder") or dataset

    def builder_class(self, dataset: str) -> type:
        """The builder of a dataset."""
        return registry.get_builder_class(self.builder(dataset))

    def to_dict(self) -> dict:
        """All settings as plain containers, interpolations resolved."""
        sections = {name: getattr(self, f"{name}_cfg") for name in SECTIONS}
        return {name: OmegaConf.to_container(section, resolve=True) for name, section in sections.items()}

    def changes(self) -> dict[str, tuple[Any, Any]]:
        """{key: (default, value)} of the settings that differ from the defaults, those in default files included."""
        schemas, defaults = self._schemas(merge(*self._sources)), merge(*self._sources[:-2])
        before = {}
        for name, schema in schemas.items():
            is_dataset = name.startswith("datasets.")
            section = self._dataset(name[9:], defaults, schemas) if is_dataset else self._typed(name, defaults, schema)
            before |= _flat(OmegaConf.to_container(section, resolve=True), name)
        now = _flat(self.to_dict())
        return {key: (before.get(key), value) for key, value in now.items() if before.get(key) != value}

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

    def _schemas(self, merged: DictConfig) -> dict[str, type | None]:
        """The dataclass of each section. None: any key is accepted."""
        schemas = {
            "run": self._schema("task", merged, "run.task", RunConfig),
            "model": self._schema("model", merged, "model.arch", MiniGPT4Config),
            "env": EnvConfig,
            "preprocess": PreprocessConfig,
        }
        for name in merged.get("datasets", {}):
            builder = builder_name(merged, name)
            own = None if builder in shipped_datasets() else registry.get_builder_class(builder)
            schemas[f"datasets.{name}"] = getattr(own, "config_class", None) if own else ShippedDatasetConfig
        return schemas

    @staticmethod
    def _schema(kind: str, merged: DictConfig, key: str, builtin: type) -> type | None:
        """The dataclass of a section: ours, or that of the plug-in named at `key` (None: any key is accepted)."""
        default = getattr(builtin, key.split(".")[1])
        name = config_files.text_at(merged, key) or default
        if name == default:
            return builtin
        try:
            plugin = registry.get(kind, name)
        except KeyError as error:
            raise ConfigError(f"{key}: {error.args[0]}") from None
        schema = getattr(plugin, "config_class", None)
        if kind == "model":
            return schema  # without one, a plug-in's model takes any key
        if schema and not issubclass(schema, builtin):
            raise ConfigError(f"{key}: {plugin.__name__}.config_class must be a subclass of {builtin.__name__}.")
        return schema or builtin

    def _dataset(self, name: str, merged: DictConfig, schemas: dict[str, type | None]) -> DictConfig:
        """A section `datasets.<name>`. Splits without a processor get that of `preprocess`.

        If there is none either, captions that BLIP wrote get `blip_caption`, and all other texts stay as they are. The
        text processor for "eval" is that for "train" if none is named.
        """
        section = f"datasets.{name}"
        dataset = self._typed(section, merged, schemas[section])
        if schemas[section] is None:  # keys of its own beside ours
            dataset = OmegaConf.merge(dataset, self._typed(section, merged, DatasetConfig, others=True))
        builder = builder_name(merged, name)
        ours = {"text_processor": TEXT_PROCESSOR} if builder in BLIP_CAPTIONS else {}
        for kind in ("vis_processor", "text_processor"):
            own = dataset.get(kind) or {}
            if not isinstance(own, (dict, DictConfig)):
                raise ConfigError(
                    f"{section}.{kind} = {own!r} (set in {self.origin(f'{section}.{kind}')}) is no mapping."
                )
            shared = OmegaConf.merge(ours.get(kind, {}), self.preprocess_cfg[kind])
            if kind == "text_processor" and "eval" not in self.preprocess_cfg[kind] and own.get("train"):
                shared["eval"] = own["train"]
            dataset[kind] = {**shared, **{split: each for split, each in own.items() if each}}
        return dataset

    def _typed(self, section: str, merged: DictConfig, schema: type | None, others: bool = False) -> DictConfig:
        """The section checked against its dataclass, defaults filled in. others: leave out keys that it lacks."""
        values = OmegaConf.select(merged, section)
        values = OmegaConf.create({}) if values is None else values
        if schema is None:
            return values
        known = [f.name for f in fields(schema)]
        if others:
            values = OmegaConf.masked_copy(values, [name for name in values if name in known])
        return self._checked(section, values, schema)

    def _checked(self, section: str, values: DictConfig, schema: type) -> DictConfig:
        """The values at the key `section` with the types and within the bounds of a dataclass, defaults filled in."""
        self._check_names(f"{section}.", values, [f.name for f in fields(schema)])
        self._check_texts(section, values, schema)
        try:
            values = OmegaConf.create(values)  # a copy
            for field in fields(schema):
                keys, key, given = field.metadata.get("keys"), f"{section}.{field.name}", values.get(field.name)
                if keys and field.metadata["kind"] == "mappings" and given is not None:
                    values[field.name] = self._checked_mappings(key, given, keys)
                elif keys and isinstance(given, DictConfig):
                    values[field.name] = self._checked_mapping(key, given, keys)
            typed = OmegaConf.structured(schema)
            pair = (OmegaConf.to_container(each, resolve=False) for each in (typed, values))
            if wrong := config_files.conflict(*pair):
                key, value = wrong
                raise ConfigError(f"{self._where(f'{section}.{key}', value)} must be {config_files.other_kind(value)}.")
            typed = OmegaConf.merge(typed, values)
            OmegaConf.resolve(typed)
            OmegaConf.to_container(typed, resolve=True)  # \${x} has become ${x}, which can be read no more
        except OmegaConfBaseException as error:
            raise self._type_error(section, schema, error) from None
        for field in fields(schema):
            key, value, metadata = f"{section}.{field.name}", typed[field.name], field.metadata
            if (choices := metadata.get("choices")) and value is not None and value not in choices:
                known = f"{', '.join(choices)}.{did_you_mean(value, choices)}"
                raise ConfigError(f"{self._where(key, value)} is not one of {known}")
            if metadata.get("kind") == "path" and isinstance(value, str) and not value.strip():
                raise ConfigError(f"{self._where(key, value)} is an empty path.")
            if "bounds" in metadata and (broken := broken_bound(value, metadata["bounds"], typed.get)):
                raise ConfigError(f"{self._where(key, value)} {broken}.")
        return typed

    def _checked_mapping(self, key: str, given: DictConfig, keys: type) -> dict:
        """`_checked`, without the keys that are not given."""
        below = self._checked(key, given, keys)
        return {name: below[name] for name in given}

    def _checked_mappings(self, key: str, given: Any, keys: type) -> dict:
        """The mappings in a mapping, checked."""
        named = given.items() if isinstance(given, DictConfig) else []
        for where, value in [(key, given), *((f"{key}.{name}", each) for name, each in named)]:
            if not isinstance(value, DictConfig):
                raise ConfigError(f"{self._where(where, value)} must be a mapping.")
        return {name: self._checked_mapping(f"{key}.{name}", each, keys) for name, each in named}

    def _check_texts(self, section: str, values: DictConfig, schema: type) -> None:
        """Raise ConfigError for a text that YAML has read as a number or a truth value: 007 would become 7."""
        hints, raw = get_type_hints(schema), OmegaConf.to_container(values, resolve=False)
        for field in fields(schema):
            if field.metadata.get("choices"):
                continue  # they tell which texts there are
            value, kind = raw.get(field.name), field.metadata.get("kind")
            hint = without_none(hints[field.name])
            if kind == "texts" or hint == list[str]:
                wrong = [each for each in (value if isinstance(value, list) else [value]) if not _is_text(each)]
            else:
                is_name = kind == "name" and field.name in raw and not isinstance(value, (str, dict))
                is_number = is_text(hint) and not isinstance(value, (dict, list)) and not _is_text(value)
                wrong = [value] if is_name or is_number else []
            if wrong:
                where = self._where(f"{section}.{field.name}", value)
                raise ConfigError(f"{where} is not a text: YAML reads {wrong[0]!r}. Put quotes around it.")

    def _type_error(self, section: str, schema: type, error: OmegaConfBaseException) -> ConfigError:
        name = (getattr(error, "full_key", None) or "").split(".")[-1].split("[")[0]
        hint = get_type_hints(schema).get(name)
        key = f"{section}.{name}"
        source = next((source for _, source in reversed(self._sources) if _sets(source, key)), None)
        if "Interpolation" in type(error).__name__:
            told = "${…} stands for another key of its section, or as ${oc.env:NAME} for a variable."
            key = key if name else section
            return ConfigError(f"{key} (set in {self.origin(key)}): {str(error).splitlines()[0]}. {told}")
        if hint is None or source is None:
            return ConfigError(f"{section} (set in {self.origin(section)}): {str(error).splitlines()[0]}")
        value = OmegaConf.to_container(OmegaConf.select(source, section), resolve=False)[name]
        expected = hint.__name__ if type(hint) is type else hint
        return ConfigError(f"{self._where(key, value)} is not of type {expected}.")

    def _where(self, key: str, value: Any) -> str:
        """The beginning of a message about a value."""
        return f"{key} = {value!r} (set in {self.origin(key)})"

    def _check_names(self, prefix: str, values: DictConfig, known: Iterable[str]) -> None:
        for key in (f"{prefix}{name}" for name in values if name not in known):
            if instead := what_to_write(key):
                raise ConfigError(f"{key} (set in {self.origin(key)}) is a key of upstream's later code. {instead}")
        check_names(
            values, sorted(known), lambda name: f"Unknown key {prefix}{name} in {self.origin(f'{prefix}{name}')}"
        )


def _is_text(value) -> bool:
    return value is None or isinstance(value, (str, bytes, Path, Enum))


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


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """The innermost values by dotted key. A list is a value."""
    if not isinstance(settings, dict):
        return {prefix: settings}
    start = f"{prefix}." if prefix else ""
    return {key: value for name, each in settings.items() for key, value in _flat(each, f"{start}{name}").items()}
