"""Reading, refusing and writing weights."""

import errno
import io
import os

import pytest
import torch
from helpers import ROOT
from safetensors.torch import save_file
from torch import nn

from minigpt4.weights import checkpoint
from minigpt4.weights.checkpoint import CheckpointError


@pytest.fixture
def layer():
    return nn.Linear(3, 2)


def test_reads_pth_and_safetensors_alike(tmp_path, layer):
    state = {k: v.detach() for k, v in layer.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "a.pth")
    torch.save(state, tmp_path / "b.pth", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "c.safetensors")
    for name in ("a.pth", "b.pth", "c.safetensors"):
        read = checkpoint.read_weights(tmp_path / name)
        assert read.keys() == state.keys()
        assert torch.equal(read["weight"], state["weight"])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n",
        b"\x80\x02garbage",
        b"# A text",
        b"hello world",
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_hold_no_weights(tmp_path, content, suffix):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"broken{suffix}.*cannot be read as weights") as caught:
        checkpoint.read_weights(path)
    assert "weights_only" not in str(caught.value)  # torch would have the user allow any code


def test_pickles_that_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit",))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="cannot be read as weights"):
        checkpoint.read_weights(tmp_path / "evil.pth")


def test_a_tensor_alone_is_no_state_dict(tmp_path):
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    with pytest.raises(CheckpointError, match="holds a Tensor"):
        checkpoint.read_weights(tmp_path / "tensor.pth")


def test_mismatches_are_loud(layer):
    good = {k: v.detach().clone() + 1 for k, v in layer.state_dict().items()}
    for weights, message in (
        ({"weight": good["weight"]}, "bias is missing"),
        (good | {"extra": torch.zeros(1)}, "extra is not part of the model"),
        (good | {"weight": torch.zeros(2, 4)}, r"weight has shape \(2, 4\), the model's \(2, 3\)"),
    ):
        before = layer.weight.detach().clone()
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load_weights(layer, weights, "file.pth", {"weight", "bias"})
        assert torch.equal(layer.weight, before)
    buffers = {"a.rotary_emb.inv_freq": torch.zeros(5), "position_ids": torch.zeros(1)}
    checkpoint.load_weights(layer, good | buffers, "file.pth", {"weight", "bias"})
    assert torch.equal(layer.weight, good["weight"])


def test_what_was_loaded_is_said(layer, caplog):
    caplog.set_level("INFO")
    checkpoint.load_weights(layer, dict(layer.state_dict()), "file.pth", set())
    assert "Loaded 2 tensors, 8 parameters from file.pth" in caplog.text


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint_0.pth"
    checkpoint.save({"epoch": 1}, path)

    def interrupted(content, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"epoch": 2}, path)
    assert checkpoint.read_file(path) == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_0.pth"]


def test_a_full_disk(tmp_path, monkeypatch):
    """torch's own writer hides the reason behind an error of its own."""
    path = tmp_path / "checkpoint_0.pth"
    checkpoint.save({"a": torch.zeros(2)}, path)
    before = path.read_bytes()

    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "open", lambda name, mode: Full(name, mode), raising=False)
    with pytest.raises(CheckpointError, match=r"checkpoint_0\.pth cannot be written: No space left on device"):
        checkpoint.save({"a": torch.ones(100_000)}, path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_checkpoint_folder_means_its_newest(tmp_path):
    for epoch in (0, 9, 10):
        (tmp_path / f"checkpoint_{epoch}.pth").touch()
    assert checkpoint.resolve(str(tmp_path)).name == "checkpoint_10.pth"
    with pytest.raises(FileNotFoundError, match="without a checkpoint_N"):
        checkpoint.resolve(str(tmp_path.parent))


def test_only_one_module_reads_and_writes_pickles():
    users = {
        path.relative_to(ROOT).as_posix()
        for path in [*ROOT.glob("minigpt4/**/*.py"), *ROOT.glob("*.py")]
        if "torch.load(" in path.read_text() or "torch.save(" in path.read_text()
    }
    assert users == {"minigpt4/weights/checkpoint.py"}


def test_weights_in_recomputed_layers_keep_their_names(build_golden_model):
    """What a run with recomputation saves, it can resume from, and so can one without."""
    model = build_golden_model(llm_grad_checkpoint=2)
    model.llama_model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    weights = checkpoint.trainable_parameters(model)
    name = "llama_model.model.layers.0.self_attn.q_proj.weight"
    assert name in weights and weights.keys() <= model.state_dict().keys()
    changed = {key: value.detach() + 1 for key, value in weights.items()}
    for target in (model, build_golden_model()):
        checkpoint.load_weights(target, changed, "a run", required=set(changed))
        assert torch.equal(target.state_dict()[name], changed[name])
