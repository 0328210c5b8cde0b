"""A projection is refused by a language model it was not trained with, whatever the precision of either."""

import logging
import re

import numpy as np
import pytest
import torch
from helpers import QFORMER, VIT

from minigpt4.models import MiniGPT4
from minigpt4.models.llm import load_llm
from minigpt4.weights import fingerprint
from minigpt4.weights.fingerprint import MismatchError

LLAMA = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"vocab_size": 300}


def write_llama(folder, tokenizer_of, seed=0, **sizes):
    """A random Llama as a folder, with the golden tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**(LLAMA | sizes))).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((tokenizer_of / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory, golden_llm_folder):
    root = tmp_path_factory.mktemp("models")
    return {
        "ours": write_llama(root / "ours", golden_llm_folder),
        "same sizes": write_llama(root / "same", golden_llm_folder, seed=1),
        "more layers": write_llama(root / "layers", golden_llm_folder, num_hidden_layers=3),
        "more tokens": write_llama(root / "tokens", golden_llm_folder, vocab_size=301),
    }


@pytest.fixture
def build(folders):
    def build(llm="ours", **cfg):
        vision = {"image_size": 28, "vit_model": VIT, "vit_weights": None, "q_former_model": None, "qformer": QFORMER}
        return MiniGPT4.from_config({**vision, "llama_model": str(folders[llm]), **cfg})

    return build


@pytest.fixture
def checkpoint(build, tmp_path):
    """Writes a checkpoint as the runner does, of a model with these keys."""

    def write(**cfg):
        model = build(**cfg)
        weights = {f"llama_proj.{name}": value for name, value in model.llama_proj.state_dict().items()}
        path = tmp_path / "checkpoint_0.pth"
        torch.save({"model": weights, "epoch": 0, fingerprint.KEY: model.fingerprint}, path)
        return path

    return write


@pytest.mark.parametrize("load_in", ["16bit", "8bit", "4bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_does_not_matter(folders, load_in, dtype):
    if load_in != "16bit":
        pytest.importorskip("bitsandbytes")
    folder = str(folders["ours"])
    first = fingerprint.take(load_llm(folder, torch.device("cpu"), torch.float32), folder, "{}", "###")
    second = fingerprint.take(load_llm(folder, torch.device("cpu"), dtype, load_in), folder, "{}", "###")
    assert second["embedding_rows"].shape == (8, 128) and second["embedding_rows"].dtype == torch.float16
    fingerprint.check(first, second, "a.pth")
    other = str(folders["same sizes"])
    third = fingerprint.take(load_llm(other, torch.device("cpu"), dtype, load_in), other, "{}", "###")
    with pytest.raises(MismatchError):
        fingerprint.check(first, third, "a.pth")


def test_the_same_language_model_is_accepted(build, checkpoint, caplog):
    caplog.set_level(logging.INFO)
    path = checkpoint()
    model = build(ckpt=str(path))
    assert torch.equal(model.llama_proj.weight, torch.load(path, weights_only=True)["model"]["llama_proj.weight"])
    assert "was trained with" not in caplog.text


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ("same sizes", r"the token embeddings do not \(cosine -?0\.\d+; the same model has over 0\.999\)"),
        ("more layers", "layers 3 instead of 2"),
        ("more tokens", "vocabulary 301 instead of 300"),
    ],
)
def test_another_language_model_is_refused(build, checkpoint, folders, caplog, other, difference):
    path = checkpoint()
    with pytest.raises(MismatchError) as error:
        build(other, ckpt=str(path))
    message = str(error.value)
    assert (
        f"{path} was trained with another language model: {folders['ours']} (128 wide, 2 layers, 300 tokens)" in message
    )
    assert f"Yours is {folders[other]} (128 wide, " in message
    assert re.search(difference, message)
    assert "--options model.allow_llm_mismatch=true" in message
    build(other, ckpt=str(path), allow_llm_mismatch=True)
    assert "Allowed by model.allow_llm_mismatch" in caplog.text


def test_another_template_is_only_reported(build, checkpoint, caplog):
    """Stage 2 starts from a checkpoint of stage 1."""
    caplog.set_level(logging.INFO)
    path = checkpoint()
    build(ckpt=str(path), end_sym="###", prompt_template="###Human: {} ###Assistant: ")
    said = [r.getMessage() for r in caplog.records if "was trained with" in r.getMessage()]
    now = "now, as from stage 1 to stage 2."
    assert said == [
        f"{path} was trained with model.prompt_template='{{}}'; it is '###Human: {{}} ###Assistant: ' {now}",
        f"{path} was trained with model.end_sym='\\n'; it is '###' {now}",
    ]


def test_published_checkpoints_have_none(build, checkpoint, tmp_path):
    content = torch.load(checkpoint(), weights_only=True)
    del content[fingerprint.KEY]
    torch.save(content, tmp_path / "published.pth")
    build("same sizes", ckpt=str(tmp_path / "published.pth"))


def test_one_row_tells(folders):
    """A model that was trained on has moved the rows of frequent tokens, not all."""
    own = fingerprint.take(load_llm(str(folders["ours"]), torch.device("cpu"), torch.float32), "a", "{}", "###")
    moved = own["embedding_rows"].clone()
    moved[5] += 0.1 * moved[5].abs().mean() * torch.randn(128)
    with pytest.raises(MismatchError, match="token embeddings do not"):
        fingerprint.check(own | {"embedding_rows": moved}, own, "a.pth")


def test_cosines_of_odd_rows():
    zeros, ones, nans = np.zeros((1, 4)), np.ones((1, 4)), np.full((1, 4), np.nan)
    assert fingerprint.cosines(zeros, zeros) == 1
    assert fingerprint.cosines(ones, ones * 3) == pytest.approx(1)
    for other in (zeros, nans, -ones):
        assert fingerprint.cosines(ones, other) <= 0
    assert fingerprint.cosines(nans, nans) == 0


@pytest.mark.parametrize("vocabulary", [1, 40, 773, 32000, 151936])
def test_rows_exist(vocabulary):
    ids = fingerprint.row_ids(vocabulary)
    assert len(ids) == 8 and 0 <= min(ids) and max(ids) < vocabulary


V0 = {"prompt_template": "###Human: {} ###Assistant: ", "end_sym": "###"}


@pytest.mark.parametrize(
    ("trained", "used"),
    [
        ({"template": "vicuna_v1"}, {"template": "vicuna_v1"}),
        ({}, {"template": "vicuna_v1"}),  # stage 2 after stage 1
        (V0, {"template": "vicuna_v0"}),
        ({"template": "vicuna_v0"}, V0),
    ],
)
def test_the_same_template(build, checkpoint, trained, used):
    build(ckpt=str(checkpoint(**trained)), **used)


@pytest.mark.parametrize(
    ("trained", "used"),
    [
        ({"template": "vicuna_v1"}, {"template": "llama2"}),
        ({"template": "vicuna_v1"}, {}),
        ({"template": "vicuna_v1"}, V0),
        (V0, {"template": "vicuna_v1"}),
    ],
)
def test_another_template_is_refused(build, checkpoint, caplog, trained, used):
    path = checkpoint(**trained)
    with pytest.raises(fingerprint.MismatchError, match=r"model\.template.*allow_llm_mismatch"):
        build(ckpt=str(path), **used)
    build(ckpt=str(path), allow_llm_mismatch=True, **used)
    assert "template" in caplog.text
