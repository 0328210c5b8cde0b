"""python -m minigpt4 merge: a language model that answers as with its adapters, and never over something."""

import pytest
import torch
from lora_models import LORA, SAMPLES, adapters, save, trained
from omegaconf import OmegaConf

from minigpt4.__main__ import main
from minigpt4.common.errors import ConfigError
from minigpt4.models import MiniGPT4

pytest.importorskip("peft")


@pytest.fixture
def config(golden_config, build_golden_model, tmp_path):
    """A YAML file of a model with trained adapters, and a projector of two layers."""
    model = trained(build_golden_model(lora=LORA, projector="mlp"))
    own = {"lora": LORA, "projector": "mlp", "ckpt": save(model, tmp_path / "a.pth")}
    path = tmp_path / "lora.yaml"
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(golden_config), {"model": own}), path)
    return path


def merge(config, out, *options):
    return main(["merge", "--cfg-path", str(config), "--out", str(out), *(["--options", *options] if options else [])])


def logits(model):
    batch = model.prepare(SAMPLES)["tokens"]
    features = torch.linspace(-1, 1, 3 * 8 * 24).view(3, 8, 24)
    with torch.no_grad():
        return model.predict(model.embed(batch, model.project(features)), batch)


@pytest.mark.parametrize("options", [[], ["model.load_in=8bit_weights"]])
def test_the_merged_model_is_used_without_adapters(config, tmp_path, caplog, options):
    """With the checkpoint beside it. The original weights are merged, also where the run quantised them."""
    caplog.set_level("INFO")
    out = tmp_path / "merged"
    if options:
        out.mkdir()
    assert merge(config, out, *options) == 0
    assert "model.lora=null" in caplog.text and str(out) in caplog.text
    keys = OmegaConf.to_container(OmegaConf.load(config))["model"]
    expected = MiniGPT4.from_config(keys)
    merged = MiniGPT4.from_config(
        keys | {"llama_model": str(out), "ckpt": str(out / "checkpoint_merged.pth"), "lora": None}
    )
    assert not adapters(merged) and adapters(expected)
    difference = (logits(merged) - logits(expected)).norm() / logits(expected).norm()
    assert 0 < difference <= 1e-5
    assert "merged into model.llama_model already" in merge(config, tmp_path / "twice", f"model.llama_model={out}")
    with pytest.raises(ConfigError, match="merged into model.llama_model already"):
        MiniGPT4.from_config(keys | {"llama_model": str(out)})
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".merged.") and p.is_dir()] == []


def test_a_folder_with_files_stays(config, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for out in (tmp_path / "mine", tmp_path / "mine" / "notes.txt"):
        assert "Nothing was changed" in merge(config, out)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_an_interrupted_run_leaves_nothing(config, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("minigpt4.cli.merge.write", interrupted)
        merge(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert merge(config, tmp_path / "out") == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["model.lora=null"], "model.lora is not set"),
        (["model.ckpt=null"], "model.ckpt is not set"),
        (["model.lora.r=4"], "r=2, not 4"),
        (["model.ckpt=/nowhere.pth"], "does not exist"),
    ],
)
def test_what_cannot_be_merged(config, tmp_path, options, words):
    assert words in merge(config, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_adapters(config, build_golden_model, tmp_path):
    path = save(build_golden_model(projector="mlp"), tmp_path / "b.pth")
    assert "nothing to merge" in merge(config, tmp_path / "out", f"model.ckpt={path}")
