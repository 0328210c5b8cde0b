"""Loading the frozen parts: checked before the language model, read without a second copy, reported."""

import json
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from helpers import SMALL_SIZES as SMALL

from minigpt4.benchmarks import random_weights
from minigpt4.common.errors import ConfigError
from minigpt4.models import MiniGPT4, llm, loading
from minigpt4.models.loading import PUBLISHED_QFORMER, qformer_origin
from minigpt4.tasks.cached_features import vision_identity
from minigpt4.weights import checkpoint
from minigpt4.weights.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return random_weights.write(tmp_path_factory.mktemp("weights"), "small", text_branch=True)


def config(files, **cfg):
    paths = {"vit_weights": "vision", "q_former_model": "qformer", "llama_model": "llm", "ckpt": "ckpt"}
    return {**SMALL, **{key: str(files[part]) for key, part in paths.items()}, **cfg}


def test_the_report_names_each_part(files, caplog):
    caplog.set_level("INFO")
    model = MiniGPT4.from_config(config(files), dtype=torch.bfloat16)
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in caplog.text.splitlines() if "parameters  " in line}
    assert lines.keys() == {name.split(".")[0] for name, _ in model.named_parameters()}
    assert lines["visual_encoder"] == "30 tensors 154,048 parameters bfloat16+float32 on cpu, frozen"
    assert lines["llama_model"] == "21 tensors 8,520,320 parameters bfloat16 on cpu, frozen"
    assert lines["query_tokens"].startswith("1 tensor 1,536 parameters float32")
    assert lines["llama_proj"] == "2 tensors 6,272 parameters float32 on cpu, trainable"
    assert f"Not used of {files['vision']}: blocks.2 (13), head (2), norm (2)" in caplog.text
    assert f"Not used of {files['qformer']}: Qformer.bert (14), Qformer.cls (7), t5_proj (2)" in caplog.text


def test_an_encoder_that_trains_is_in_float32(files):
    model = MiniGPT4.from_config(config(files, freeze_vit=False, freeze_qformer=False), dtype=torch.bfloat16)
    assert {p.dtype for p in model.visual_encoder.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in model.Qformer.parameters())
    model.query_tokens.data += 1  # mapped from the file, which stays the same
    model.visual_encoder.blocks[0].norm1.weight.data += 1
    model.Qformer.bert.embeddings.LayerNorm.weight.data += 1
    again = MiniGPT4.from_config(config(files))
    for name in ("visual_encoder.blocks.0.norm1.weight", "Qformer.bert.embeddings.LayerNorm.weight", "query_tokens"):
        torch.testing.assert_close(again.state_dict()[name] + 1, model.state_dict()[name])


class MoreQueries(MiniGPT4):
    """A plug-in whose parameters' names begin like those of the Q-Former's queries and of the projection."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.query_tokens_x = torch.nn.Parameter(torch.ones(3))
        self.module = torch.nn.Linear(2, 2)


def test_a_plugins_parameter_is_not_taken_for_the_qformers(files, tmp_path):
    model = MoreQueries.from_config(config(files))
    assert torch.equal(model.query_tokens_x.detach(), torch.ones(3))
    trained = {name: p.detach() + 1 for name, p in model.named_parameters() if p.requires_grad}
    assert {"query_tokens_x", "module.weight", "llama_proj.weight"} <= trained.keys()
    torch.save({"model": trained}, tmp_path / "trained.pth")
    again = MoreQueries.from_config(config(files, ckpt=str(tmp_path / "trained.pth")))
    assert torch.equal(again.query_tokens_x.detach(), torch.full((3,), 2.0))
    assert torch.equal(again.module.weight.detach(), trained["module.weight"])
    cfg = config(files, ckpt=str(tmp_path / "trained.pth"))
    assert vision_identity(cfg)["ckpt"] is None  # so that cached features stay valid


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_checkpoint_of_a_wrapped_model(files, tmp_path, prefix, caplog):
    caplog.set_level("INFO")
    content = torch.load(files["ckpt"], weights_only=True)
    content["model"] = {f"{prefix}{name}": value for name, value in content["model"].items()}
    torch.save(content, tmp_path / "wrapped.pth")
    wrapped, whole = (
        MiniGPT4.from_config(config(files, ckpt=str(p))) for p in (tmp_path / "wrapped.pth", files["ckpt"])
    )
    assert torch.equal(wrapped.llama_proj.weight, whole.llama_proj.weight)
    assert f"wrapped.pth: all names begin with {prefix!r}" in caplog.text


@pytest.mark.parametrize("part", ["vision", "qformer", "ckpt"])
def test_each_part_is_looked_at_for_nan(files, tmp_path, part):
    content = torch.load(files[part], weights_only=True)
    weights = content.get("model", content)
    name = {"vision": "blocks.1.norm1.weight", "qformer": "query_tokens", "ckpt": "llama_proj.weight"}[part]
    weights[name].view(-1)[-1] = float("nan")
    torch.save(content, tmp_path / "nan.pth")
    key = {"vision": "vit_weights", "qformer": "q_former_model", "ckpt": "ckpt"}[part]
    with pytest.raises(CheckpointError, match=f"nan.pth: NaN or infinity among the numbers of {name}"):
        MiniGPT4.from_config(config(files, **{key: str(tmp_path / "nan.pth")}))


def test_settings_of_the_language_model_are_refused_before_anything_is_read(files, monkeypatch):
    """No weights of the vision side are loaded first."""
    monkeypatch.setattr(loading, "open_sources", lambda cfg: pytest.fail("weights were opened"))
    for wrong in ({"llama_model": str(files["ckpt"])}, {"llm_device_map": "auto", "load_in": "8bit_weights"}):
        with pytest.raises(ConfigError, match="model\\.(llama_model|load_in)="):
            MiniGPT4.from_config(config(files, **wrong))


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_qformer_is_in_16_bit(files, frozen):
    model = MiniGPT4.from_config(config(files, freeze_qformer=frozen), dtype=torch.bfloat16)
    layer = model.Qformer.bert.encoder.layer[0]
    assert layer.attention.self.query.weight.dtype == (torch.bfloat16 if frozen else torch.float32)
    assert layer.attention.output.LayerNorm.weight.dtype == model.query_tokens.dtype == torch.float32


def test_nothing_stays_on_the_meta_device(files):
    model = MiniGPT4.from_config(config(files))
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_host_holds_no_second_copy(tmp_path, files):
    """With 340 MB of encoder and Q-Former: tensors read in their own type stay mapped, others are copied once."""
    from minigpt4.benchmarks import published

    sizes = published.SIZES["7b"] | {"vit_width": 704, "vit_blocks": 18, "vit_ffn": 2816, "qformer_layers": 6}
    for name, table, dtype in (
        ("eva.pth", published.eva_vit(sizes), torch.float16),
        ("blip2.pth", published.blip2(sizes), torch.float32),
    ):
        values = random_weights.RandomValues(0)
        tensors = {key: values.tensor(key, shape, dtype) for key, shape in table.items()}
        checkpoint.save({"model": tensors}, tmp_path / name)
    cfg = {
        "vit_model": {"embed_dim": 704, "depth": 17, "num_heads": 11, "patch_size": 14, "mlp_ratio": 4.0},
        "qformer": {"num_hidden_layers": 6},
        "vit_weights": str(tmp_path / "eva.pth"),
        "q_former_model": str(tmp_path / "blip2.pth"),
        "llama_model": str(files["llm"]),
    }
    code = f"""
import threading, time, torch
from minigpt4.common.errors import ConfigError
from minigpt4.models import MiniGPT4
def own():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024
peak = [0]
def watch():
    while True:
        peak[0] = max(peak[0], own())
        time.sleep(0.01)
MiniGPT4.from_config({config(files)!r})  # the libraries' own memory
threading.Thread(target=watch, daemon=True).start()
for dtype in (torch.float16, torch.float32):
    before = peak[0] = own()
    model = MiniGPT4.from_config({cfg!r}, dtype=dtype)
    sizes = [sum(p.nbytes for p in part.parameters()) for part in (model.visual_encoder, model.Qformer)]
    print(*sizes, peak[0] - before)
    del model
"""
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    half, full = (tuple(map(int, line.split())) for line in printed.stdout.splitlines())
    encoder, q_former, taken = half
    assert encoder > 1.5e8 and q_former > 0.8e8
    assert taken < 0.2 * encoder + 1.2 * q_former  # the file has the encoder in 16 bit, the Q-Former in 32
    encoder, q_former, taken = full
    assert taken < 1.2 * encoder + 0.2 * q_former


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"pos_embed": torch.zeros(1, 257, 64)}, r"vit\.pth.*blocks\.0\.attn\.proj\.bias is missing"),
        (None, r"vit\.pth.*Git-LFS"),
    ],
)
def test_broken_files_are_found_before_the_language_model_is_loaded(files, tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(llm, "load_llm", lambda *args: pytest.fail("the language model was loaded"))
    path = tmp_path / "vit.pth"
    if content is None:
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        MiniGPT4.from_config(config(files, vit_weights=str(path)))


def projection(path, config=None):
    """Write a checkpoint whose projection has the published input width. Returns its path."""
    tensors = {"llama_proj.weight": torch.zeros(128, 768), "llama_proj.bias": torch.zeros(128)}
    torch.save({"model": tensors} | ({"config": config} if config else {}), path)
    return str(path)


def qformer_folder(folder, kind, width, model_type="blip-2"):
    """The files of a Hugging Face folder that say which BLIP-2 it is."""
    folder.mkdir()
    width_name = "d_model" if kind == "t5" else "hidden_size"
    settings = {"model_type": model_type, "text_config": {"model_type": kind, width_name: width}}
    (folder / "config.json").write_text(json.dumps(settings))
    torch.save({"query_tokens": torch.zeros(1, 32, 768)}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize(
    ("kind", "width", "model_type", "origin"),
    [
        ("t5", 4096, "blip-2", PUBLISHED_QFORMER),
        ("t5", 2048, "blip-2", "the Q-Former of a BLIP-2 with t5, 2048 wide"),
        ("opt", 4096, "blip-2", "the Q-Former of a BLIP-2 with opt, 4096 wide"),
        ("t5", 4096, "instructblip", "the Q-Former of an InstructBLIP with t5"),
    ],
)
def test_origin_of_a_qformer_in_a_folder(tmp_path, files, kind, width, model_type, origin):
    folder = qformer_folder(tmp_path / "blip2", kind, width, model_type)
    assert qformer_origin(folder, {}) == origin
    cfg = MiniGPT4.config_class(
        **config(files, q_former_model=str(folder), ckpt=projection(tmp_path / "published.pth"))
    )
    if origin == PUBLISHED_QFORMER:
        assert loading.open_sources(cfg).trained
    else:
        with pytest.raises(CheckpointError, match=rf"{PUBLISHED_QFORMER}.*model\.q_former_model={folder} is {origin}"):
            loading.open_sources(cfg)


@pytest.mark.parametrize(
    ("name", "width", "origin"),
    [
        ("t5_proj.weight", 4096, PUBLISHED_QFORMER),
        ("t5_proj.weight", 2048, "the Q-Former of a BLIP-2 with t5, 2048 wide"),
        ("opt_proj.weight", 2560, "the Q-Former of a BLIP-2 with opt, 2560 wide"),
        ("other", 1, None),
    ],
)
def test_origin_of_a_qformer_in_a_file_of_lavis(tmp_path, name, width, origin):
    assert qformer_origin(tmp_path / "blip2.pth", {name: torch.zeros(width, 2)}) == origin


def test_another_qformer_is_allowed_for_a_projection_of_its_own(tmp_path, files):
    folder = str(qformer_folder(tmp_path / "blip2", "opt", 2560))
    published = {"model": {"q_former_model": "/elsewhere/blip2_pretrained_flant5xxl.pth"}}
    own = {"model": {"q_former_model": folder}}
    for trained_on, allowed in ((published, False), (own, True), ({"model": {}}, False)):
        ckpt = projection(tmp_path / "ckpt.pth", trained_on)
        cfg = MiniGPT4.config_class(**config(files, q_former_model=folder, ckpt=ckpt))
        if allowed:
            assert loading.open_sources(cfg).trained
        else:
            with pytest.raises(CheckpointError, match=r"model\.q_former_model=.* BLIP-2 with opt"):
                loading.open_sources(cfg)
    cfg = MiniGPT4.config_class(**config(files, q_former_model=folder, ckpt=None))
    assert loading.open_sources(cfg).qformer


def test_a_qformer_of_unknown_origin_is_logged(tmp_path, files, caplog):
    torch.save({"query_tokens": torch.zeros(1, 32, 768)}, tmp_path / "q.pth")
    ckpt = projection(tmp_path / "ckpt.pth")
    cfg = MiniGPT4.config_class(**config(files, q_former_model=str(tmp_path / "q.pth"), ckpt=ckpt))
    loading.open_sources(cfg)
    assert re.search(r"model\.q_former_model=\S+q\.pth .*which BLIP-2", caplog.text)
