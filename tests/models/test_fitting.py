"""Parts that load and do not belong together are named."""

from types import SimpleNamespace

import pytest
import torch
from conversation_cases import CHATML, TOKENIZERS, renderer
from helpers import ROOT

from minigpt4.common.schema import MiniGPT4Config
from minigpt4.models import fitting
from minigpt4.models.fitting import doubts, published_with
from minigpt4.models.template import TEMPLATES, from_chat_template, resolve
from minigpt4.models.tokenizer import load_tokenizer
from minigpt4.weights.fingerprint import MismatchError

V0 = {"prompt_template": "###Human: {} ###Assistant: ", "end_sym": "###"}
LLAMA2 = {"template": "llama2"}


@pytest.fixture
def write(tmp_path):
    def write(name="prerained_minigpt4_7b.pth", shape=(4096, 768), **others) -> str:
        weights = {"llama_proj.weight": torch.zeros(shape), "llama_proj.bias": torch.zeros(shape[0])}
        torch.save({"model": weights, **others}, tmp_path / name)
        return str(tmp_path / name)

    return write


def found(tokens, positions, tokenizer="SentencePiece", added=(), **keys):
    cfg, tokenizer = MiniGPT4Config(**keys), TOKENIZERS[tokenizer]()
    tokenizer.special_tokens |= dict.fromkeys(added, tokens)
    config = SimpleNamespace(max_position_embeddings=positions)
    return [(doubt.key, doubt.what) for doubt in doubts(cfg, resolve(cfg), tokenizer, tokens, config)]


@pytest.mark.parametrize(
    ("name", "llm", "keys", "doubt"),
    [
        ("prerained_minigpt4_7b.pth", (32001, 2048), V0, None),
        ("prerained_minigpt4_7b.pth", (32001, 2048), {}, None),  # stage 1's bare prompt
        ("prerained_minigpt4_7b.pth", (32000, 2048), V0, "Vicuna v1.1"),
        ("renamed.pth", (32000, 4096), {"template": "vicuna_v0"}, "Vicuna v1.5"),
        ("renamed.pth", (128256, 8192), V0, "no Vicuna"),
        ("pretrained_minigpt4_llama2_7b.pth", (32000, 4096), LLAMA2, None),
        ("pretrained_minigpt4_llama2_7b.pth", (32001, 2048), LLAMA2, "Vicuna v0"),
    ],
)
def test_a_published_projection_with_another_language_model(write, name, llm, keys, doubt):
    said = found(*llm, ckpt=write(name), **keys)
    assert [key for key, _ in said] == ["model.llama_model"] * (doubt is not None)
    assert not said or doubt in said[0][1] and name in said[0][1]


def test_a_vicuna_v0_without_the_row_of_its_pad_token(write):
    assert found(32000, 2048, added=["[PAD]"], ckpt=write(), **V0) == []


def test_other_files_are_not_published_ones(write):
    assert published_with(write()) == "vicuna_v0"
    assert published_with(write("13b.pth", (5120, 768))) == "vicuna_v0"
    assert published_with(write("Llama-2.pth")) == "llama2"
    assert published_with(write("small.pth", (64, 48))) is None
    assert published_with(write("own.pth", llm_fingerprint={})) is None
    assert published_with(write("first_release.pth", config={}, epoch=3)) is None


def test_a_published_projection_under_another_template(write):
    """`model.template` is refused; the first release's keys, which cannot say it all, are only doubted."""
    with pytest.raises(MismatchError, match="model.template=vicuna_v1: .*--options model.template=vicuna_v0"):
        found(32001, 2048, ckpt=write(), template="vicuna_v1")
    assert [key for key, _ in found(32001, 2048, ckpt=write(), template="vicuna_v1", allow_llm_mismatch=True)] == [
        "model.template"
    ]
    assert [key for key, _ in found(32000, 4096, ckpt=write("llama2.pth"), **V0)] == ["model.template"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_blank_that_is_a_token_of_its_own(kind):
    """After `###Assistant: `, where training and the first release's chat differ by it."""
    for keys in (V0, {"template": "vicuna_v0"}):
        assert [key for key, _ in found(500, 2048, kind, **keys)] == ["model.template"] * (kind != "SentencePiece")
    for keys in ({}, {"template": "vicuna_v1"}, LLAMA2):  # chat has no other form, or no other prompt was trained
        assert found(500, 2048, kind, **keys) == []


def test_a_tokenizer_that_puts_a_blank_before_each_text():
    """As tiny's does, whose blank is a token of its own, too: answers begin with one, in chat as in training."""
    tokenizer, cfg = load_tokenizer(str(ROOT / "minigpt4/assets/tiny/llama")), MiniGPT4Config(template="vicuna_v0")
    assert tokenizer.encode("x: ")[-1:] == tokenizer.encode(" ")
    assert [*doubts(cfg, resolve(cfg), tokenizer, 773, SimpleNamespace())] == []


def test_the_doubts_about_a_model_are_logged(build_golden_model, golden_model_keys, write, monkeypatch, caplog):
    model = build_golden_model()
    caplog.clear()
    monkeypatch.setattr(fitting, "WIDTHS", (64,))
    section = {**golden_model_keys, "ckpt": write(shape=(64, 768))}
    fitting.log_doubts(section, model)
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage().startswith("model.llama_model: ")
    fitting.log_doubts(section, torch.nn.Linear(1, 1))  # a plug-in's model
    assert len(caplog.records) == 1


def test_auto_leaves_no_doubt():
    template = from_chat_template(renderer(CHATML), "<|im_end|>")
    tokenizer = TOKENIZERS["byte-level BPE"]()
    assert [*doubts(MiniGPT4Config(template="auto"), template, tokenizer, 500, SimpleNamespace())] == []
    assert "ImageContent" not in template.start + template.system + TEMPLATES["vicuna_v1"].start
