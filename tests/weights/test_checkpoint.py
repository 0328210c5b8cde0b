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


def test_other_objects_are_named_by_type(tmp_path):
    torch.save({"model": nn.Linear(2, 2)}, tmp_path / "module.pth")
    with pytest.raises(CheckpointError, match=r"of type torch\.nn\.modules\.linear\.Linear.*state_dict"):
        checkpoint.read_weights(tmp_path / "module.pth")
    for weights, message in (
        ({"llama_proj.weight": [1.0], "llama_proj.bias": torch.zeros(1)}, "llama_proj.weight is a list"),
        ([torch.zeros(1)], "model is a list"),
        (3, "model is an int"),
        ({0: torch.zeros(1)}, "0 is a Tensor"),
    ):
        torch.save({"model": weights, "epoch": 3}, tmp_path / "a.pth")
        with pytest.raises(CheckpointError, match=message):
            checkpoint.read_weights(tmp_path / "a.pth")
    torch.save({"epoch": 3, "config": {}}, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="epoch is an int, config is a dict"):
        checkpoint.read_weights(tmp_path / "b.pth")
    settings = {"epoch": 3, "model": "a name"}  # beside the tensors they are usual
    torch.save(settings | {"weight": torch.ones(1)}, tmp_path / "c.pth")
    assert checkpoint.read_weights(tmp_path / "c.pth").keys() == {"weight"}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("key", ["model", "state_dict", None])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, caplog, prefix, key):
    caplog.set_level("INFO")
    state = {f"{prefix}{name}": torch.ones(2) for name in ("llama_proj.weight", "llama_proj.bias")}
    torch.save({key: state} if key else state, tmp_path / "a.pth")
    assert checkpoint.read_weights(tmp_path / "a.pth").keys() == {"llama_proj.weight", "llama_proj.bias"}
    assert repr(prefix) in caplog.text


def test_prefixes_that_are_no_wrappers_stay(tmp_path):
    ours = {"module.weight": torch.ones(2)}
    assert checkpoint.weights_of(ours, "a.pth", own=["module.weight"]).keys() == {"module.weight"}
    assert checkpoint.weights_of({f"module.{n}": t for n, t in ours.items()}, "a.pth", own=list(ours)).keys() == {
        "module.weight"
    }
    mixed = ours | {"bias": torch.ones(2)}
    assert checkpoint.weights_of(mixed, "a.pth").keys() == mixed.keys()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("on_meta", [False, True])
def test_numbers_that_are_not_finite_are_refused(number, on_meta):
    weight = torch.ones(2, 3)
    weight[1, 1] = number
    with torch.device("meta" if on_meta else "cpu"):
        layer = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match="a.pth: NaN or infinity among the numbers of weight"):
        checkpoint.load_weights(layer, {"weight": weight, "bias": torch.ones(2)}, "a.pth", {"weight"}, "cpu")
    assert on_meta or torch.isfinite(layer.weight).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_is_finite(dtype):
    """Also where the sum of finite numbers overflows."""
    largest = torch.full((64,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)
    assert checkpoint.is_finite(largest)
    largest[7] = float("nan")
    assert not checkpoint.is_finite(largest)
    assert checkpoint.is_finite(torch.ones(2, dtype=torch.int64)) and checkpoint.is_finite(torch.ones(2, device="meta"))


def test_numbers_that_the_models_type_cannot_hold_are_refused():
    layer = nn.Linear(1, 1).half()
    with pytest.raises(CheckpointError, match="float16 cannot hold"):
        checkpoint.load_weights(layer, {"weight": torch.full((1, 1), 1e6)}, "a.pth", set())


def test_flipped_bytes_are_found_by_the_archives_checksums(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"model": {"weight": torch.randn(1000)}, "epoch": 1}, path)
    checkpoint.read_file(path)
    content = bytearray(path.read_bytes())
    for i in range(64):
        content[2000 + i] ^= 1  # the numbers stay finite
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="a.pth is damaged: 1 of .* a/data/0"):
        checkpoint.read_file(path)


def test_archives_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"weight": torch.ones(3)}, tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(checkpoint.read_weights(tmp_path / "a.pth")["weight"], torch.ones(3))


def test_folders_in_place_of_checkpoints(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"Give a file, such as .*model\.safetensors"):
        checkpoint.resolve(str(tmp_path))
    (tmp_path / "checkpoint_3.pth").mkdir()
    with pytest.raises(CheckpointError, match="checkpoint_3.pth is a folder"):
        checkpoint.read_file(checkpoint.resolve(str(tmp_path)))


@pytest.mark.timeout(20)
def test_a_pipe_in_place_of_a_checkpoint_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="a.pth is no file of weights: it is a pipe"):
        checkpoint.read_file(checkpoint.resolve(str(tmp_path / "a.pth")))


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
    run = tmp_path / "run"
    run.mkdir()
    for epoch in (0, 9, 10):
        (run / f"checkpoint_{epoch}.pth").touch()
    assert checkpoint.resolve(str(run)).name == "checkpoint_10.pth"
    with pytest.raises(FileNotFoundError, match=f"without a checkpoint_N.*a run's folder, such as {run}"):
        checkpoint.resolve(str(tmp_path))


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
