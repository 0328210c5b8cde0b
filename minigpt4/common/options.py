"""`--options key=value`: the type of a key decides how its value is read.

A text is the text itself, whatever YAML would make of it: `run.output_dir=2024_01_05`, `model.ckpt=007`. Three forms
have a meaning of their own: `null` is no text, quotes around the whole value are YAML's, and in texts that are no paths
`\\n`, `\\t` and `\\\\` are a line break, a tabulator and a backslash. The values of all other keys are YAML.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from minigpt4.common import typography
from minigpt4.common.config_files import shipped_datasets, with_sections
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import UnknownNameError, registry
from minigpt4.common.schema import EnvConfig, MiniGPT4Config, PreprocessConfig, RunConfig, ShippedDatasetConfig

PROCESSORS = ("vis_processor", "text_processor")
OPTION = r"[A-Za-z_][\w-]*(\.[\w-]+)+=.*"
ESCAPES = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}
# The type of a key, and the `kind` of its setting.
KeyType = tuple[Any, str]


def parse_options(
    options: list[str], type_of: Callable[[str], KeyType] | None = None, strict: bool = True
) -> DictConfig:
    """`["run.batch_size_train=8", …]` as a nested config. If a key is given twice, the later value wins.

    Args:
        type_of: the type of a key; None: those of the package, without plug-ins.
        strict: False: a value that is not valid YAML is text, so that other values can be read before types are known.

    Raises ConfigError for an item without key or value, and for shards that are given twice: a shell expands an
    unquoted `{00000..01255}` to many items, and the run would read only the last shard.
    """
    parsed, given, type_of = OmegaConf.create({}), {}, type_of or KeyTypes()
    for option in options:
        key, _, text = option.partition("=")
        if not re.fullmatch(OPTION, option, re.DOTALL):
            form = "section.key=value, without spaces around =, as in run.init_lr=1e-4"
            typed = typography.plain(option).strip("\"' ")
            typed = typed if "=" in typed else typed.replace(":", "=", 1)
            hint = f" Write {typed!r}." if re.fullmatch(OPTION, typed) else ""
            raise ConfigError(f"--options {option!r} is not of the form {form}.{hint}")
        if not text:
            raise ConfigError(
                f"--options {option!r} has no value. Write it after the = without a space; {key}=null unsets the key, "
                f"{key}='\"\"' empties it."
            )
        if text[0] not in "\"'`" and (slip := typography.slip_in_value(text)):
            raise ConfigError(f"--options {key}: {slip}. If this text is meant, give it in quotes: {key}='\"…\"'")
        if key.endswith(".storage") and given.setdefault(key, text) != text:
            raise ConfigError(
                f"--options gives {key} more than once: {given[key]!r} and {text!r}. Give it once; put quotes around "
                f"a range, as in {key}='{{00000..01255}}.tar', or the shell expands it."
            )
        try:
            value = _read(text, key, type_of)
        except ConfigError:
            if strict:
                raise
            value = text
        try:
            OmegaConf.update(parsed, key, value, force_add=True)
        except GrammarParseError:
            raise ConfigError(
                f"--options {option!r}: its ${{ does not begin a reference, as ${{oc.env:NAME}}."
            ) from None
        except (OmegaConfBaseException, ValueError):
            raise ConfigError(f"--options {option!r}: a key above it has a value that is no mapping.") from None
    return with_sections(parsed, "--options")


def _read(text: str, key: str, type_of: Callable[[str], KeyType]) -> Any:
    """The value of a key. Raises ConfigError."""
    hint, kind = type_of(key)
    if kind == "texts" and text.startswith("["):
        with suppress(ConfigError):  # a pattern, [ab]*.tar
            return _read_yaml(text, key, type_of)
    if (kind == "name" and text.startswith("{")) or not (is_text(hint) or kind in ("texts", "name")):
        return _read_yaml(text, key, type_of)
    if text in ("null", "Null", "NULL"):
        return None
    if text[0] == text[-1] and text[0] in "\"'" and len(text) > 1:
        try:
            return str(yaml.load(text, yaml.BaseLoader))
        except yaml.YAMLError:  # 'a' and 'b'
            pass
    return text if kind in ("path", "texts") else re.sub(r"\\[nt\\]", lambda match: ESCAPES[match[0]], text)


def _read_yaml(text: str, key: str, type_of: Callable[[str], KeyType]) -> Any:
    """A value as YAML, in which texts stay as they were written. Other than in YAML, the whole may be such a text.

    Plain YAML would drop everything after a `#`, read `Human: {}` as a mapping and strip spaces.
    """
    if text.startswith("#") or text.isspace():
        return text
    # A brace range of shards, such as {00000..01255}.tar, is no mapping.
    structured = text[0] in "[\"'" or (text[0] == "{" and ":" in text) or text == "{}"
    try:
        value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)["value"]
        written = yaml.load(f"value: {text}", yaml.BaseLoader)["value"]
    except Exception as error:  # OmegaConf raises more than yaml's
        if structured:
            raise ConfigError(f"--options {key}={text} is not valid YAML: {error}") from None
        return text
    if structured:
        return _with_texts(value, written, key, type_of)
    if type(value) is int and re.fullmatch(r"[+-]?0[0-9]+", text) and type_of(key)[0] is not Any:
        return int(text)  # to YAML 1.1 it is octal
    # 2024_01_05 and 007 are whole numbers to YAML. Of a key without a type they are more likely names.
    is_name = type(value) is int and str(value) != text and type_of(key)[0] is Any
    return text if is_name or isinstance(value, (str, dict, list)) else value


def _with_texts(value: Any, written: Any, key: str, type_of: Callable[[str], KeyType]) -> Any:
    """A value that YAML has read, in which texts are as `written`."""
    if isinstance(value, dict):
        pairs = zip(value.items(), written.values(), strict=True)
        return {name: _with_texts(each, text, f"{key}.{name}", type_of) for (name, each), text in pairs}
    hint, kind = type_of(key)
    if isinstance(value, list):
        texts = kind == "texts" or is_text((get_args(without_none(hint)) or (Any,))[0])
        return written if texts else value
    return written if value is not None and (is_text(hint) or kind) else value


class KeyTypes:
    """The types of keys: those that dataclasses declare, and those of the arguments of processors.

    Args:
        schemas: {section: dataclass, or None}, where a section is `run` or `datasets.laion`; beside the package's own.
        merged: all settings, in which processors have names.
    """

    def __init__(self, schemas: Mapping[str, type | None] = {}, merged: DictConfig | None = None):  # noqa: B006
        shipped = {f"datasets.{name}": ShippedDatasetConfig for name in shipped_datasets()}
        ours = {"run": RunConfig, "model": MiniGPT4Config, "preprocess": PreprocessConfig, "env": EnvConfig}
        self._schemas, self._merged = ours | shipped | dict(schemas), merged

    def __call__(self, key: str) -> KeyType:
        """The type of a key, Any if none is declared, and its kind."""
        section, *names = key.split(".")
        if section == "datasets" and names:
            section, *names = f"datasets.{names[0]}", *names[1:]
        if len(names) == 3 and names[0] in PROCESSORS:
            return self._argument(section, *names), ""
        hint, metadata = self._schemas.get(section) or Any, {}
        for name in names:
            parent = metadata.get("keys") or without_none(hint)
            if is_dataclass(parent):
                hint = get_type_hints(parent).get(name, Any)
                metadata = next((each.metadata for each in fields(parent) if each.name == name), {})
            else:
                hint, metadata = get_args(parent)[1] if get_origin(parent) is dict else Any, {}
        return hint, metadata.get("kind", "")

    def _argument(self, section: str, kind: str, split: str, name: str) -> Any:
        """The type of an argument of the processor of a split."""
        if name == "name":
            return str
        settings = self._merged or OmegaConf.create({})
        places = (f"{place}.{kind}.{split}.name" for place in (section, "preprocess"))
        processor = next((found for place in places if (found := OmegaConf.select(settings, place))), None)
        try:
            return argument_types(registry.get_processor_class(processor)).get(name, Any) if processor else Any
        except UnknownNameError:  # reported where processors are built
            return Any


def argument_types(made: type) -> dict[str, Any]:
    """The types of the arguments of a class, as far as they are declared with names that can be found."""
    try:
        return get_type_hints(made.__init__)
    except NameError:
        return {}


def without_none(hint: Any) -> Any:
    """The type T of an optional type `T | None`; other types as they are."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    others = [each for each in get_args(hint) if each is not NoneType]
    return others[0] if len(others) == 1 else hint


def is_text(hint: Any) -> bool:
    """Whether values of a type are written as texts; the type may be optional."""
    hint = without_none(hint)
    if get_origin(hint) is Literal:
        return all(isinstance(each, str) for each in get_args(hint))
    return isinstance(hint, type) and issubclass(hint, (str, Path, Enum))
