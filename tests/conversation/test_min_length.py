"""`min_length` of chat and captions: tiny always ends by "###", which is one token."""

from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT

from minigpt4.common.config import Config
from minigpt4.conversation import CONV_VISION
from minigpt4.conversation.loading import load_chat
from minigpt4.fast.decoding.loop import cached_decoding

PROMPTS = ["###Human: Hello ###Assistant:", "###Human: What is a cat? ###Assistant:"]


@pytest.fixture(scope="module")
def tiny():
    cfg = Config(SimpleNamespace(cfg_path=ROOT / "eval_configs/minigpt4_tiny_eval.yaml", options=[]))
    return load_chat(cfg, torch.device("cpu"))


@pytest.mark.parametrize("loop", [cached_decoding, None], ids=["own loop", "transformers"])
@pytest.mark.parametrize(
    "settings", [{"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True, "seed": 1}]
)
def test_answers_have_their_fewest_tokens(tiny, monkeypatch, loop, settings):
    monkeypatch.setattr(tiny, "decoding_loop", loop)
    settings = {"max_new_tokens": 60, **settings}

    def answer(least):
        conv = CONV_VISION.copy()
        tiny.ask("Hello", conv)
        return tiny.answer(conv, [], min_length=least, **settings)

    short, short_ids = answer(1)
    assert len(short_ids) < 25
    text, ids = answer(25)
    assert len(ids) > 25 and "###" not in tiny.model.tokenizer.decode(ids[:25].tolist(), skip_special_tokens=False)
    assert "#" not in text and len(text) > len(short)
    assert answer(len(short_ids) - 1)[0] == short or settings.get("num_beams")  # no longer than it has to be


@pytest.mark.parametrize("loop", [cached_decoding, None], ids=["own loop", "transformers"])
@pytest.mark.parametrize("beams", [1, 2])
def test_captions_of_a_batch_have_their_fewest_tokens(tiny, loop, beams):
    def captions(least):
        return tiny.model.generate(
            None, PROMPTS, "###", decoding_loop=loop, num_beams=beams, max_new_tokens=70, min_new_tokens=least
        )

    tokenizer = tiny.model.tokenizer
    assert max(len(tokenizer.encode(text)) for text in captions(1)) < 40
    assert min(len(tokenizer.encode(text)) for text in captions(45)) >= 45
