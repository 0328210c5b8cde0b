"""`--options`: the type of a key decides how its value is read."""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from helpers import ROOT
from omegaconf import OmegaConf

from minigpt4.common.config import Config, ConfigError
from minigpt4.common.options import KeyTypes, parse_options
from minigpt4.common.registry import registry
from minigpt4.common.schema import RunConfig

STAGE2 = ROOT / "train_configs/minigpt4_stage2_finetune.yaml"
# What YAML reads as a number, a truth value, null, a time, a comment, an alias or an error.
TEXTS = [
    *("2024_01_05", "007", "1e5", "0x10", "1:30", "12", "1.50", "no", "True", "~", "off", "2024-01-05", ".nan"),
    *(
        "[INST] {} [/INST]",
        "{}",
        "{a: b}",
        "[a, b]",
        "a: b",
        "a #b",
        "#",
        "*a",
        "&a b",
        "!x",
        "|",
        "- a",
        "%",
        ":",
        "?",
    ),
    *("'a' and 'b'", "'", '"', " a ", "@a", "`a`", "a\tb", "[", "{", "é 。"),
]


def value(option, type_of=None):
    key = option.partition("=")[0]
    return OmegaConf.select(parse_options([option], type_of), key)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", ["run.output_dir", "model.ckpt", "model.prompt_template", "env.cache_root", "run.task"])
def test_a_text_is_the_text_itself(key, text):
    assert value(f"{key}={text}") == text


@pytest.mark.parametrize("key", ["model.ckpt", "model.end_sym"])
@pytest.mark.parametrize(
    ("quoted", "expected"), [("'007'", "007"), ('"no"', "no"), ("' a '", " a "), ('""', ""), ("'null'", "null")]
)
def test_a_quoted_text_is_yaml(key, quoted, expected):
    assert value(f"{key}={quoted}") == expected


def test_no_text():
    assert value("model.ckpt=null") is None
    with pytest.raises(ConfigError, match=r"run\.output_dir = None .* is not of type str"):
        load("run.output_dir=null")


@pytest.mark.parametrize(
    ("text", "expected"),
    [(r"\n", "\n"), (r"a\nb\t", "a\nb\t"), (r"\\n", r"\n"), (r"\d", r"\d"), (r'"\n"', "\n"), (r"'\n'", r"\n")],
)
def test_line_breaks(text, expected):
    assert value(f"model.end_sym={text}") == value(f"model.prompt_template={text}") == expected


def test_paths_keep_their_backslashes():
    assert value(r"model.ckpt=C:\new\table") == r"C:\new\table"
    assert value(r"datasets.laion.build_info.storage=C:\new\\table") == r"C:\new\\table"


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("run.valid_splits=[no, 007, '1', val]", ["no", "007", "1", "val"]),
        ("run.imports=[2024]", ["2024"]),
        ("datasets.laion.build_info.storage=2024", "2024"),
        ("datasets.laion.build_info.storage=[a, 007]", ["a", "007"]),
        ("datasets.laion.build_info.storage=[ab]*.tar", "[ab]*.tar"),
        ("datasets.laion.build_info.storage={00..03}.tar", "{00..03}.tar"),
        ("datasets.laion.build_info={storage: 007, features: no}", {"storage": "007", "features": "no"}),
        ("datasets.laion.build_info={storage: [1e3, no]}", {"storage": ["1e3", "no"]}),
        ("datasets.laion.build_info={storage: null}", {"storage": None}),
        ("datasets.laion={sample_ratio: 2, data_type: 7}", {"sample_ratio": 2, "data_type": "7"}),
        ("model.vit_model=007", "007"),
        ("model.vit_model={depth: 2}", {"depth": 2}),
        ("run.seed=7", 7),
        ("run.amp=no", False),
        ("run.init_lr=1e-3", 1e-3),
        # without a type
        ("datasets.other.key=007", "007"),
        ("datasets.other.key=2024_01_05", "2024_01_05"),
        ("datasets.other.key=7", 7),
        ("datasets.other.key=no", False),
        ("datasets.other.key=1e-3", 1e-3),
        ("datasets.other.key={a: [1, b]}", {"a": [1, "b"]}),
    ],
)
def test_values_by_type(option, expected):
    assert value(option) == expected


class Color(Enum):
    NO = 1


@dataclass
class Inner:
    tag: str = ""
    size: int = 0


@dataclass
class TaskKeys(RunConfig):
    task: str = "typed"
    tag: str = ""
    note: str | None = None
    tags: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)
    color: Color = Color.NO
    kind: Literal["007", "008"] = "007"
    folder: Path = Path()
    anything: Any = None


TYPED = KeyTypes({"run": TaskKeys})


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("run.tag=007", "007"),
        ("run.tag=[INST] {}", "[INST] {}"),
        (r"run.tag=\n", "\n"),
        ("run.note=no", "no"),
        ("run.note=null", None),
        ("run.tags=[007, no]", ["007", "no"]),
        ("run.names={a: 007, b: no}", {"a": "007", "b": "no"}),
        ("run.names.a=007", "007"),
        ("run.inner={tag: 007, size: 3}", {"tag": "007", "size": 3}),
        ("run.inner.tag=007", "007"),
        ("run.inner.size=3", 3),
        ("run.color=NO", "NO"),
        ("run.kind=007", "007"),
        ("run.folder=2024_01", "2024_01"),
        ("run.anything=no", False),
    ],
)
def test_keys_of_a_plugin(option, expected):
    assert value(option, TYPED) == expected


def load(*options):
    return Config(SimpleNamespace(cfg_path=STAGE2, options=list(options)))


def test_the_types_of_registered_plugins(open_registry):
    from minigpt4.tasks import BaseTask

    @registry.register_task("typed")
    class Typed(BaseTask):
        config_class = TaskKeys

    options = ["run.task=typed", "run.tag=[INST] {} [/INST]", "run.names={a: 007}", "run.kind=008", "run.inner.tag=no"]
    run = load(*options).run_cfg
    assert (run.tag, run.names, run.kind, run.inner.tag) == ("[INST] {} [/INST]", {"a": "007"}, "008", "no")
    with pytest.raises(ConfigError, match=r"Unknown key run\.tag"):
        load("run.tag=1")


def test_arguments_of_processors():
    name = "datasets.cc_sbu_align.text_processor.train"
    options = [f"{name}.name=blip_caption", f"{name}.prompt=007", f"{name}.max_words=5"]
    settings = load(*options).datasets_cfg.cc_sbu_align.text_processor.train
    assert settings == {"name": "blip_caption", "prompt": "007", "max_words": 5}
    whole = load(f"{name}={{name: blip_caption, prompt: no}}").datasets_cfg.cc_sbu_align.text_processor.train
    assert whole.prompt == "no"
    shared = load("preprocess.text_processor.train={name: blip_caption}", "preprocess.text_processor.train.prompt=no")
    assert shared.preprocess_cfg.text_processor.train.prompt == "no"


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("run: {output_dir: 2024_01_05}", r"run\.output_dir"),
        ("run: {valid_splits: [val, 7]}", r"run\.valid_splits"),
        ("model: {ckpt: 007}", r"model\.ckpt"),
        ("model: {end_sym: no}", r"model\.end_sym"),
        ("model: {vit_model: 7}", r"model\.vit_model"),
        ("datasets: {cc_sbu_align: {build_info: {storage: 3}}}", r"datasets\.cc_sbu_align\.build_info\.storage"),
        ("datasets: {cc_sbu_align: {build_info: {storage: [a, 3]}}}", r"datasets\.cc_sbu_align\.build_info\.storage"),
    ],
)
def test_texts_in_files_are_not_read_as_numbers(tmp_path, section, key):
    path = tmp_path / "run.yaml"
    path.write_text(section)
    with pytest.raises(ConfigError, match=rf"{key} = .*{path}.*quotes"):
        Config(SimpleNamespace(cfg_path=path, options=[]))
    quoted = {"2024_01_05": "'2024_01_05'", "007": "'007'", "no": "'no'", "7": "'7'", "3": "'3'"}
    for plain, text in quoted.items():
        section = section.replace(f" {plain}", f" {text}")
    path.write_text(section)
    Config(SimpleNamespace(cfg_path=path, options=[]))
