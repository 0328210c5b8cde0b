"""python -m minigpt4 make-random-weights, and the loading of every format it writes."""

import json
import re
import shlex

import pytest
import torch
from helpers import ROOT
from safetensors import safe_open

from minigpt4.__main__ import main
from minigpt4.benchmarks import published, random_weights
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.models import MiniGPT4
from minigpt4.weights import checkpoint

SMALL = published.SIZES["small"]


def make(capsys, *arguments):
    """The options that the command prints."""
    from minigpt4.__main__ import main

    assert not main(["make-random-weights", *map(str, arguments)])
    printed = capsys.readouterr().out.splitlines()[-1]
    return shlex.split(printed.removeprefix("--options "))


def config(options, path="train_configs/minigpt4_stage1_pretrain.yaml"):
    from types import SimpleNamespace

    return Config(SimpleNamespace(cfg_path=ROOT / path, options=options))


@pytest.mark.parametrize(
    ("flags", "files"),
    [
        (["--text-branch"], "model-\\d{5}-of-00001.safetensors"),
        (["--vicuna", "v0", "--bin"], "pytorch_model-\\d{5}-of-00001.bin"),
        (["--vicuna", "v1.5", "--shard-gb", "0.01"], "model-\\d{5}-of-00002.safetensors"),
        (["--vicuna", "v1.1", "--bin", "--shard-gb", "0.01"], "pytorch_model-\\d{5}-of-00002.bin"),
    ],
)
def test_what_is_written_loads(tmp_path, capsys, flags, files):
    options = make(capsys, "--out", tmp_path, "--size", "small", *flags)
    cfg = config(options)
    cfg.check_paths()
    model = MiniGPT4.from_config(cfg.model_cfg)
    (folder,) = (p for p in tmp_path.iterdir() if p.is_dir())
    index = json.loads(next(folder.glob("*.index.json")).read_text())["weight_map"]
    assert all(re.fullmatch(files, file) and (folder / file).is_file() for file in index.values())
    vocabulary = 32001 if "v0" in flags else 32000
    assert model.llama_model.get_input_embeddings().num_embeddings == vocabulary
    assert ("[PAD]" in model.tokenizer.special_tokens) == ("v0" in flags)
    encoder = checkpoint.read_weights(tmp_path / "eva_vit_g.pth")
    assert torch.equal(model.visual_encoder.blocks[1].mlp.fc2.weight, encoder["blocks.1.mlp.fc2.weight"].float())
    projection = checkpoint.read_weights(tmp_path / "prerained_minigpt4_7b.pth")
    assert torch.equal(model.llama_proj.weight, projection["llama_proj.weight"])
    model.end_sym = "###"
    loss = model({"image": torch.randn(2, 3, 224, 224), "text_input": ["a dog runs", "漢字 \U0001f600"]})["loss"]
    assert 9 < loss.item() < 13  # ln 32000 = 10.4


def test_files_hold_the_published_names_and_types(tmp_path):
    paths = random_weights.write(tmp_path, "small", text_branch=True)
    vision = checkpoint.read_file(paths["vision"])
    assert {name: tuple(t.shape) for name, t in vision.items()} == published.eva_vit(SMALL)
    assert {t.dtype for t in vision.values()} == {torch.float16}
    qformer = checkpoint.read_file(paths["qformer"])["model"]
    assert {name: tuple(t.shape) for name, t in qformer.items()} == published.blip2(SMALL, text_branch=True)
    assert {name for name, t in qformer.items() if t.dtype != torch.float32} == {"Qformer.bert.embeddings.position_ids"}
    assert checkpoint.read_file(paths["ckpt"])["model"].keys() == {"llama_proj.weight", "llama_proj.bias"}
    shard = safe_open(paths["llm"] / "model-00001-of-00001.safetensors", "pt")
    assert set(shard.keys()) == published.llama(SMALL).keys()
    assert all(shard.get_tensor(name).dtype == torch.float16 for name in shard.keys())


def test_v0_in_bin_has_what_transformers_4_28_wrote(tmp_path):
    folder = random_weights.write(tmp_path, "small", parts=("llm",), vicuna="v0", as_bin=True)["llm"]
    state = checkpoint.read_file(folder / "pytorch_model-00001-of-00001.bin")
    assert state["model.layers.1.self_attn.rotary_emb.inv_freq"].shape == (16,)
    assert json.loads((folder / "added_tokens.json").read_text()) == {"[PAD]": 32000}
    assert json.loads((folder / "tokenizer_config.json").read_text())["bos_token"] == ""


def test_values_are_repeatable_normal_and_do_not_repeat_within_a_matrix():
    first, second, other = (random_weights.RandomValues(seed) for seed in (1, 1, 2))
    shape = (5000, 4096)  # more than the pool
    matrix = first.tensor("a.weight", shape, torch.float16)
    assert torch.equal(matrix, second.tensor("a.weight", shape, torch.float16))
    assert not torch.equal(matrix, other.tensor("a.weight", shape, torch.float16))
    assert matrix.float().std().item() == pytest.approx(0.02, rel=0.01)
    assert len(matrix.unique(dim=0)) == 5000
    assert first.tensor("norm1.weight", (1000,), torch.float16).float().mean().item() == pytest.approx(1, abs=0.01)
    assert first.tensor("norm1.bias", (1000,), torch.float16).float().mean().item() == pytest.approx(0, abs=0.01)


def test_existing_files_stay(tmp_path, capsys):
    (tmp_path / "eva_vit_g.pth").write_bytes(b"the real one")
    options = make(capsys, "--out", tmp_path, "--size", "small", "--parts", "vision", "ckpt")
    assert (tmp_path / "eva_vit_g.pth").read_bytes() == b"the real one"
    encoder, ckpt = "eva_vit_g.pth", "prerained_minigpt4_7b.pth"
    assert options[:2] == [f"model.vit_weights={tmp_path / encoder}", f"model.ckpt={tmp_path / ckpt}"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [encoder, ckpt]


def test_a_full_disk_is_noticed_first(tmp_path, monkeypatch):
    usage = random_weights.shutil.disk_usage(tmp_path)._replace(free=10**9)
    monkeypatch.setattr(random_weights.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match="1.0 GB free; the files need 15.9 GB"):
        random_weights.write(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(random_weights, "_write_tokenizer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            random_weights.write(tmp_path, "small", parts=("llm",))
    folder = random_weights.write(tmp_path, "small", parts=("llm",))["llm"]
    assert (folder / "tokenizer.model").is_file()


def test_a_folder_that_is_not_of_this_command_is_left_alone(tmp_path, capsys):
    folder = tmp_path / "vicuna-small-v1.1"
    folder.mkdir()
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"of the user")
    with pytest.raises(ConfigError, match=f"{folder} is in the way"):
        random_weights.write(tmp_path, "small")
    assert [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] == [b"of the user"]
    file = next(folder.iterdir())
    assert f"--out {file} cannot be a folder" in main(["make-random-weights", "--out", str(file), "--size", "small"])
