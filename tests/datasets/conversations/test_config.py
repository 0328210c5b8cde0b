"""Datasets of any name, by the key `builder`."""

import json
from types import SimpleNamespace

import pytest
from dataset_files import picture_bytes, write_align
from helpers import ROOT
from omegaconf import OmegaConf

from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.datasets.builders import CCSBUAlignBuilder, ConversationBuilder
from minigpt4.doctor import check_datasets
from minigpt4.doctor.run_context import RunContext


def config(tmp_path, datasets, *options) -> Config:
    path = tmp_path / "own.yaml"
    tiny = OmegaConf.load(ROOT / "train_configs/minigpt4_tiny_stage2_finetune.yaml")
    OmegaConf.save({**tiny, "datasets": datasets}, path)
    return Config(SimpleNamespace(cfg_path=path, options=list(options)))


def write_own(folder, count=6):
    folder.mkdir()
    (folder / "0.png").write_bytes(picture_bytes(0))
    lines = [json.dumps({"id": str(n), "image": "0.png", "prompt": "What?", "answer": f"A{n}."}) for n in range(count)]
    (folder / "own.jsonl").write_text("\n".join(lines))
    return str(folder / "own.jsonl")


def test_several_datasets_of_one_form(tmp_path):
    datasets = {
        "photos": {
            "builder": "conversation",
            "build_info": {"storage": write_own(tmp_path / "a")},
            "sample_ratio": 2.0,
        },
        "drawings": {"builder": "conversation", "build_info": {"storage": write_own(tmp_path / "b")}},
        "texts": {"builder": "cc_sbu_align", "build_info": {"storage": str(write_align(tmp_path / "c"))}},
    }
    cfg = config(tmp_path, datasets, "datasets.photos.build_info.val=0.3")
    builders = [cfg.builder_class(name) for name in datasets]
    assert builders == [ConversationBuilder, ConversationBuilder, CCSBUAlignBuilder]
    assert cfg.datasets_cfg.texts.vis_processor.train.name == "blip2_image_train"
    built = registry.get_task_class("image_text_pretrain").setup_task(cfg).build_datasets(cfg)
    assert {name: list(splits) for name, splits in built.items()} == {
        "photos": ["train", "val"],
        "drawings": ["train"],
        "texts": ["train"],
    }
    assert built["drawings"]["train"][5]["text_input"][-1] == ("assistant", ("A5.",))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"build_info": {"storage": "x"}}, r"datasets\.mine \(without builder: conversation\): Unknown builder 'mine'"),
        ({"builder": "conversations"}, r"datasets\.mine\.builder: .*Did you mean 'conversation'"),
        ({"builder": 3}, r"datasets\.mine\.builder = 3 is not a text"),
        ({"builder": "conversation", "build_info": {"sotrage": "x"}}, r"build_info\.sotrage"),
        ({"builder": "conversation", "build_info": {"storage": "/no/such.jsonl"}}, r"/no/such\.jsonl"),
        ({"builder": "conversation"}, r"datasets\.mine\.build_info\.storage"),
    ],
)
def test_mistakes(tmp_path, section, words):
    with pytest.raises(ConfigError, match=words):
        cfg = config(tmp_path, {"mine": section})
        registry.get_task_class("image_text_pretrain").setup_task(cfg).build_datasets(cfg)


def test_doctor_shows_a_record_and_names_a_mistake(tmp_path):
    storage = write_own(tmp_path / "a")
    section = {"builder": "conversation", "build_info": {"storage": storage}}
    cfg = config(tmp_path, {"mine": section}, "run.batch_size_train=2")
    (found,) = check_datasets.check_conversations(RunContext(cfg))
    assert (found.check, found.status) == ("datasets.mine.build_info", "ok")
    assert "6 records" in found.what and "What? → A0." in found.what
    large = config(tmp_path, {"mine": section}, "run.batch_size_train=7")
    (found,) = check_datasets.check_conversations(RunContext(large))
    assert found.status == "error" and "run.batch_size_train=6" in found.what
    assert "data check" not in found.fix  # it would find nothing
    with open(storage, "a") as file:
        file.write('\n{"prompt": "no answer"}')
    (found,) = check_datasets.check_conversations(RunContext(cfg))
    assert found.status == "error" and "own.jsonl line 7" in found.what
