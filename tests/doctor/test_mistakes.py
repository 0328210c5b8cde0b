"""Mistakes in settings: train.py refuses each in one line, and doctor reports it as an error. Both name the key.

`tests/common/test_config.py` has those that both find when they read the config.
"""

import json
import re
import sys

import pytest
import torch
from helpers import ROOT
from omegaconf import OmegaConf

from minigpt4.cli import doctor
from minigpt4.common.config import Config, ConfigError
from minigpt4.common.registry import UnknownNameError
from minigpt4.conversation.loading import load_chat
from train import main

PROCESSOR = "datasets.cc_sbu_align.vis_processor.train"
OPTIONS = [
    *(
        "run.init_lr=nan",
        "model.qformer={num_attention_heads: 0}",
        "model.vit_model.num_heads=7",
        "model.vit_model=null",
    ),
    # tests/processors/test_processors.py has every wrong value.
    *(f"{PROCESSOR}.{bad}" for bad in ("min_scale=abc", "name=blip2_image", "sizes=3")),
    *(f"{PROCESSOR}={bad}" for bad in ("blip2_image_train", "{size: 3}")),
    "datasets.cc_sbu_align.text_processor.train={name: blip_caption, max_words: many}",
    *("datasets.cc_sbu_align.sample_ratio=abc", "datasets.cc_sbu_align.sample_ratio=0", "run.device=cuda:first"),
    *("model.train=[qformer]", "model.projector=mpl", "model.lora={r: 0}", "run.lr_groups.lora={init_lr: 1}"),
    *("model.prompt_path=FOLDER", "model.prompt_path=PICTURE", "run.train_splits=[]", "run.valid_splits=[other]"),
]
# What the messages name, where it is not the key.
NAMED = {
    "datasets.cc_sbu_align.sample_ratio=0": "sample_ratio",
    "model.vit_model.num_heads=7": "model.vit_model",
    "run.train_splits=[]": "",  # train.py: nothing to draw batches from
    "run.valid_splits=[other]": "other",
}
FILES = [
    ("run: {no: 1}", "run.False"),
    ("datasets: {cc_sbu_align: {build_info: {storage: 3}}}", "datasets.cc_sbu_align.build_info.storage"),
    ("datasets: {cc_sbu_align: {build_info: {storage: []}}}", "datasets.cc_sbu_align.build_info.storage"),
    ("datasets: {cc_sbu_align: {text_processor: {train: {name: blip_caption, prompt: 3}}}}", "text_processor.train"),
]
PLUGIN = """
from minigpt4.common.registry import registry
from minigpt4.datasets.builders.image_text_pair_builder import CCSBUAlignBuilder

@registry.register_builder("mine")
class Mine(CCSBUAlignBuilder):
    name, DATASET_CONFIG_DICT = "mine", {}
"""
SECTIONS_OF_A_PLUGIN = [
    ("sample_ratio: abc", "datasets.mine.sample_ratio"),
    ("sample_ratio: -1", "datasets.mine.sample_ratio"),
    ("vis_processor: {train: blip2_image_train}", "datasets.mine.vis_processor.train"),
    (
        "vis_processor: {train: {name: blip2_image_train, min_scale: abc, image_size: 28}}",
        "datasets.mine.vis_processor",
    ),
    ("vis_processor: 3", "datasets.mine.vis_processor"),
    ("build_info: {storage: 3}", "datasets.mine.build_info.storage"),
    ("build_info: 3", "datasets.mine.build_info"),
]
NOT_REGISTERED = {
    "twice": ('@registry.register_model("mini_gpt4")\nclass Another: ...', "already registered.*Another"),
    "number": ('registry.register_model("mine")(5)', "'mine': 5 is no class"),
    "function": ('@registry.register_task("mine")\ndef work(): ...', "'mine': work is no class"),
    "no_parentheses": ("@registry.register_model\nclass Bare: ...", "Bare: .*register_model needs a name"),
    "no_name": ('@registry.register_processor("")\nclass Nameless: ...', "register_processor needs a name"),
}


@pytest.fixture
def run(configs, capsys):
    """run(section, *arguments) -> the lines of train.py and of doctor about a run of stage 2 with a mistake."""

    def refuse(section, *arguments):
        cfg = OmegaConf.merge(OmegaConf.load(configs["stage2"]), {"model": {"ckpt": None}})
        OmegaConf.save(OmegaConf.merge(cfg, OmegaConf.create(section)), configs["stage2"])
        argv = ["--cfg-path", str(configs["stage2"]), *arguments]
        with pytest.raises((ConfigError, UnknownNameError)) as refused:
            main(argv)
        forget_plugins()
        assert doctor.main([*argv, "--json"]) in (1, 2)
        found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert not [each for each in found if "could not be made" in each["what"]]
        return str(refused.value), [f"{each['check']}: {each['what']}" for each in found if each["status"] == "error"]

    yield refuse
    forget_plugins()


def forget_plugins():
    for name in ("plugin", *NOT_REGISTERED):
        sys.modules.pop(name, None)


def both_name(key, lines):
    message, errors = lines
    assert key in message and any(key in error for error in errors), lines


@pytest.mark.parametrize("option", OPTIONS)
def test_options(run, tmp_path, option):
    (tmp_path / "folder").mkdir()
    picture = str(ROOT / "minigpt4/assets/examples/emoji/1f34e.webp")
    key = PROCESSOR if option.startswith(PROCESSOR) else NAMED.get(option, option.partition("=")[0])
    option = option.replace("=FOLDER", f"={tmp_path / 'folder'}").replace("=PICTURE", f"={picture}")
    both_name(key, run({}, "--options", option))


@pytest.mark.parametrize(("section", "key"), FILES)
def test_files(run, section, key):
    both_name(key, run(section))


@pytest.mark.parametrize(("section", "key"), SECTIONS_OF_A_PLUGIN)
def test_sections_of_a_plugin(run, parts, configs, tmp_path, monkeypatch, open_registry, section, key):
    (tmp_path / "plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    cfg = OmegaConf.load(configs["stage2"])
    own = {"build_info": {"storage": str(parts["folder"] / "align")}}
    own["vis_processor"] = {"train": {"name": "blip2_image_train", "image_size": 28}}
    mistake = OmegaConf.create(section)
    if "vis_processor" in mistake or "build_info" in mistake:
        own.pop(next(iter(mistake)))
    cfg.datasets = {"mine": OmegaConf.merge(own, mistake)}
    OmegaConf.save(cfg, configs["stage2"])
    both_name(key, run({}, "--import", "plugin"))


@pytest.mark.parametrize("name", NOT_REGISTERED)
def test_registration(run, tmp_path, monkeypatch, open_registry, name):
    source, expected = NOT_REGISTERED[name]
    (tmp_path / f"{name}.py").write_text(f"from minigpt4.common.registry import registry\n{source}\n")
    monkeypatch.syspath_prepend(tmp_path)
    message, (error,) = run({}, "--import", name)
    for line in (message, error):
        assert name in line
    assert re.search(expected, message), message


@pytest.mark.parametrize("bad", ["mean=3", "name=other"])
def test_the_processor_of_a_chat(capsys, bad):
    """It is made before the model is loaded."""
    argv = ["--cfg-path", str(ROOT / "eval_configs/minigpt4_tiny_eval.yaml"), "--options", f"{PROCESSOR}.{bad}"]
    assert doctor.main([*argv, "--json"]) == 1
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (error,) = [each for each in found if each["status"] == "error"]
    assert error["check"].startswith(PROCESSOR) and not error["what"].startswith(PROCESSOR)
    with pytest.raises(ConfigError, match=PROCESSOR):
        load_chat(Config(doctor.parse_args(argv)), torch.device("meta"))
