"""The shipped tiny default: its size, loading from its YAML files, and captions of unseen emoji."""

import random
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from minigpt4.common.config import Config
from minigpt4.common.registry import registry
from minigpt4.models import MiniGPT4
from minigpt4.models.prompt import IMAGE_SLOT

ASSETS = ROOT / "minigpt4/assets/tiny"
EVAL = ROOT / "eval_configs/minigpt4_tiny_eval.yaml"


def load(*options) -> MiniGPT4:
    cfg = Config(SimpleNamespace(cfg_path=EVAL, options=list(options)))
    cfg.check_paths()
    return MiniGPT4.from_config(cfg.model_cfg).eval()


@pytest.fixture(scope="module")
def held_out():
    """A hundred captions and images [100,3,64,64] of Fluent emoji, drawn with a fixed seed."""
    sys.path.insert(0, str(ROOT / "dataset"))
    from tiny_pictures import read_pictures
    from tiny_text import caption_of, load_concepts

    concepts = random.Random(1).sample(load_concepts(), 100)
    pictures = read_pictures(ROOT / "dataset/tiny/fluent.tar.gz")
    processor = registry.get_processor_class("blip2_image_eval")(image_size=64)
    return [caption_of(c.name) for c in concepts], torch.stack([processor(pictures[c.id]) for c in concepts])


def test_the_assets_are_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 20_000_000


def test_only_the_projection_trains():
    model = load()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["llama_proj.weight", "llama_proj.bias"]


def test_tokenizer_knows_the_chat_template():
    tokenizer = load().tokenizer
    for text in ("###Human: ", "<Img>", "</Img>", "###", "\n", "naïve café, 日本"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_stage1_names_unseen_emoji(held_out):
    """The shipped weights name 56 % of all 1,594."""
    names, images = held_out
    captions = load("model.ckpt=${package:assets/tiny/stage1.safetensors}").generate(
        images, [IMAGE_SLOT] * 100, stop="\n", max_new_tokens=30
    )
    assert sum(map(str.__eq__, captions, names)) >= 40
    assert sum(map(str.__eq__, captions, names[1:] + names[:1])) <= 3


def test_stage2_answers_in_sentences(held_out):
    names, images = held_out
    model = load()
    answers = model.generate(images, [model.prompt_list[0]] * 100, max_new_tokens=100)
    assert sum(answer.endswith(".") for answer in answers) >= 95
    assert sum(name in answer.lower() for name, answer in zip(names, answers, strict=True)) >= 35


def test_an_untrained_projection_names_nothing(held_out):
    names, images = held_out
    torch.manual_seed(0)
    captions = load("model.ckpt=null").generate(images, [IMAGE_SLOT] * 100, stop="\n", max_new_tokens=30)
    assert sum(map(str.__eq__, captions, names)) <= 2
