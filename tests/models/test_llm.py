"""Loading the language model: its formats, 8 and 4 bit on the CPU against full precision, broken weights."""

import inspect
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, loss_and_gradient
from safetensors.torch import load_file, save_file

from minigpt4.benchmarks import random_weights
from minigpt4.common import compat
from minigpt4.common.errors import ConfigError
from minigpt4.models import llm as llm_module
from minigpt4.models.llm import check_answers, embedding_dim, load_llm
from minigpt4.models.tokenizer import load_tokenizer
from minigpt4.quantization.bitsandbytes import LowBitLinear, has_bitsandbytes_layers
from minigpt4.weights.checkpoint import CheckpointError

TINY = str(ROOT / "minigpt4/assets/tiny/llama")


@pytest.fixture(scope="module")
def llm_folder(tmp_path_factory):
    """A Llama whose sizes are multiples of 64, the block size of 4-bit weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Function that copies a language model in two shards, as .bin or .safetensors, into a folder."""
    folders = {}

    def copy(as_bin: bool, folder: Path) -> Path:
        if as_bin not in folders:
            where = tmp_path_factory.mktemp("sharded")
            folders[as_bin] = random_weights.write(where, "small", parts=("llm",), shard_gb=0.01, as_bin=as_bin)["llm"]
        return Path(shutil.copytree(folders[as_bin], folder / "llm"))

    return copy


def run(llm, embeds):
    """The logits, and the gradient of the inputs."""
    embeds = embeds.clone().requires_grad_()
    logits = llm(inputs_embeds=embeds, use_cache=False).logits.float()
    logits.square().mean().backward()
    return logits.detach(), embeds.grad


@pytest.mark.parametrize(("load_in", "least_cosine"), [("8bit", 0.999), ("4bit", 0.98)])
def test_low_bit_is_close_to_full_precision(llm_folder, load_in, least_cosine):
    pytest.importorskip("bitsandbytes")
    cpu = torch.device("cpu")
    torch.manual_seed(1)
    embeds = torch.randn(2, 7, 128) * 0.02
    full = run(load_llm(llm_folder, cpu, torch.float32), embeds)
    low_model = load_llm(llm_folder, cpu, torch.float32, load_in)
    low = run(low_model, embeds)
    kinds = {type(m) for m in low_model.model.layers.modules()}
    assert LowBitLinear in kinds and torch.nn.Linear not in kinds and not has_bitsandbytes_layers(low_model)
    assert not any(p.requires_grad for p in low_model.parameters())
    for expected, value in zip(full, low, strict=True):
        cosine = torch.nn.functional.cosine_similarity(expected.flatten(), value.flatten(), dim=0)
        assert cosine > least_cosine


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_low_bit_trains_alike_after_a_validation(llm_folder, load_in):
    pytest.importorskip("bitsandbytes")
    llm = load_llm(llm_folder, torch.device("cpu"), torch.float32, load_in)
    embeds = torch.randn(2, 7, 128) * 0.02
    before = run(llm, embeds)
    with torch.no_grad():
        llm(inputs_embeds=embeds)
    for first, second in zip(before, run(llm, embeds), strict=True):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_low_bit_layers_save_no_more_than_plain_ones(llm_folder, load_in):
    """For the backward pass, a frozen layer saves neither its inputs nor its dequantized weights."""
    embeds, cpu = torch.randn(2, 50, 128) * 0.02, torch.device("cpu")
    usual, ours = (kept_bytes(load_llm(llm_folder, cpu, torch.float32, how), embeds) for how in ("16bit", load_in))
    assert 0 < ours <= usual


def kept_bytes(llm, embeds) -> int:
    """Bytes that a forward pass saves for the backward pass, without the model's own weights."""
    own = {t.untyped_storage().data_ptr() for t in (*llm.parameters(), *llm.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # kept alive, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        llm(inputs_embeds=embeds.clone().requires_grad_(), use_cache=False)
    return sum(size for size, _ in kept.values())


def test_loaded_models_are_frozen(llm_folder):
    llm = load_llm(llm_folder, torch.device("cpu"), torch.bfloat16)
    assert llm.dtype == torch.bfloat16
    assert not llm.training
    assert not any(p.requires_grad for p in llm.parameters())


def test_low_resource_means_8_bit(golden_llm_folder, monkeypatch):
    """`load_in` is more precise and takes precedence."""
    from helpers import QFORMER, VIT

    from minigpt4.models import MiniGPT4, llm

    asked, load = [], llm.load_llm

    def recording(*args, **kwargs):
        given = inspect.signature(load).bind(*args, **kwargs)
        given.apply_defaults()
        asked.append(given.arguments["load_in"])
        return load(given.arguments["llama_model"], given.arguments["device"], given.arguments["dtype"])

    monkeypatch.setattr(llm, "load_llm", recording)
    cfg = {"image_size": 28, "vit_model": VIT, "qformer": QFORMER, "vit_weights": None, "q_former_model": None}
    for extra in ({}, {"low_resource": True}, {"low_resource": True, "load_in": "4bit"}):
        MiniGPT4.from_config({**cfg, "llama_model": str(golden_llm_folder), **extra})
    assert asked == ["16bit", "8bit", "4bit"]


def test_missing_and_surplus_tensors_are_reported(llm_folder, tmp_path, caplog):
    cpu, folder = torch.device("cpu"), tmp_path / "llm"
    shutil.copytree(llm_folder, folder)
    state = load_file(folder / "model.safetensors")
    save_file(state | {"vision_tower.weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    load_llm(str(folder), cpu, torch.float32)
    assert re.search(f"{folder}.*vision_tower.weight", caplog.text)
    lacking = {name: value for name, value in state.items() if "layers.1.mlp" not in name}
    save_file(lacking, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.weight is missing"):
        load_llm(str(folder), cpu, torch.float32)
    reshaped = state | {"model.norm.weight": torch.ones(64)}
    save_file(reshaped, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has .* shape"):
        load_llm(str(folder), cpu, torch.float32)


def test_missing_shards_are_named(tmp_path, sharded):
    folder = sharded(False, tmp_path)
    (folder / "model-00002-of-00002.safetensors").unlink()
    for load in (embedding_dim, lambda path: load_llm(path, torch.device("cpu"), torch.float32)):
        with pytest.raises(ConfigError, match=r"model\.llama_model.*model-00002-of-00002\.safetensors"):
            load(str(folder))


@pytest.mark.parametrize("as_bin", [True, False])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", r"00002-of-00002\.\w+: .*Git-LFS"),
        (b"", r"00002-of-00002\.\w+: .*empty"),
        (None, ""),  # cut off: the library's own words
    ],
)
def test_broken_shards_are_named(tmp_path, sharded, as_bin, content, reason):
    folder = sharded(as_bin, tmp_path)
    (shard,) = folder.glob("*00002-of-00002*")
    shard.write_bytes(shard.read_bytes()[:100_000] if content is None else content)
    with pytest.raises(CheckpointError, match=f"{folder}.*{reason}"):
        load_llm(str(folder), torch.device("cpu"), torch.float32)


def test_shards_that_run_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit",))

    folder = random_weights.write(tmp_path, "small", parts=("llm",), as_bin=True)["llm"]
    (shard,) = folder.glob("*.bin")
    torch.save({"lm_head.weight": Evil()}, shard)
    with pytest.raises(CheckpointError, match=f"{folder}.*Weights only load failed"):
        load_llm(str(folder), torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("name", ["a.txt", "folder"])
def test_paths_without_a_language_model(tmp_path, name):
    (tmp_path / "a.txt").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=rf"model\.llama_model={tmp_path / name} .*config\.json"):
        embedding_dim(str(tmp_path / name))


def test_a_hub_id_offline(monkeypatch, tmp_path):
    """The error names the id and the reason at once."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # read when it was imported, with retries if not
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for load in (embedding_dim, lambda name: load_llm(name, torch.device("cpu"), torch.float32)):
        with pytest.raises(ConfigError, match=r"model\.llama_model=nobody/no-such-model .*--offline or HF_HUB_OFFLINE"):
            load("nobody/no-such-model")


def test_a_hub_id_is_found_in_the_cache(llm_folder, tmp_path):
    """In the layout of `huggingface_hub`, which reads HF_HOME when it is imported: hence a new process."""
    cached = tmp_path / "hub" / "models--owner--llama"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(llm_folder, cached / "snapshots" / ("0" * 40))
    code = """
import torch
from minigpt4.common.facts import go_offline
go_offline()
from minigpt4.models.llm import embedding_dim, load_llm
assert embedding_dim("owner/llama") == 128
assert load_llm("owner/llama", torch.device("cpu"), torch.float32).config.num_hidden_layers == 2
"""
    env = os.environ | {"HF_HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True, capture_output=True)


def test_the_first_conversions_of_vicuna_load(tmp_path):
    """v0 as merged in April 2023: other class names, wrong special ids, no num_key_value_heads, pad token -1."""
    folder = random_weights.write(tmp_path, "small", parts=("llm",), vicuna="v0", as_bin=True)["llm"]
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    config["max_sequence_length"] = config.pop("max_position_embeddings")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
    llm, tokenizer = load_llm(str(folder), torch.device("cpu"), torch.float32), load_tokenizer(str(folder))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.encode("[PAD]") == [32000]
    ids = torch.tensor([[1, *tokenizer.encode("###Human: Hello")]])
    assert torch.isfinite(llm(ids).logits).all()


@pytest.fixture(scope="module")
def gguf_file(llm_folder, tmp_path_factory):
    """The Llama of `llm_folder` and a small tokenizer in one .gguf file, in the form of llama.cpp's converter."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(128)
    writer.add_block_count(2)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(256)
    pieces = ["<unk>", "<s>", "</s>", *"▁abcdefghijklmnopqrstuvwxyzT.", "▁a", "an"]
    pieces += [f"<unused{i}>" for i in range(256 - len(pieces))]
    normal, unknown, control, unused = 1, 2, 3, 5
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(i) for i in range(256)])
    writer.add_token_types(
        [unknown, control, control] + [unused if p.startswith("<unused") else normal for p in pieces[3:]]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, value in load_file(Path(llm_folder) / "model.safetensors").items():
        name = name.replace("model.layers.", "blk.")
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        if name.endswith(("attn_q.weight", "attn_k.weight")):  # the order of llama.cpp's rotary embedding
            value = value.view(4, 2, 16, 128).transpose(1, 2).reshape(128, 128)
        writer.add_tensor(name, value.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def test_a_gguf_file_is_the_same_model(gguf_file, llm_folder):
    cpu = torch.device("cpu")
    assert embedding_dim(gguf_file) == 128
    embeds = torch.randn(2, 7, 128) * 0.02
    actual, expected = (run(load_llm(path, cpu, torch.float32), embeds) for path in (gguf_file, llm_folder))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)
    tokenizer = load_tokenizer(gguf_file)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.decode(tokenizer.encode("an apple")) == "an apple"


def test_a_gguf_file_goes_into_the_whole_model(gguf_file, llm_folder):
    from helpers import QFORMER, VIT

    from minigpt4.models import MiniGPT4

    cfg = {"image_size": 28, "vit_model": VIT, "qformer": QFORMER, "vit_weights": None, "q_former_model": None}
    model = MiniGPT4.from_config({**cfg, "llama_model": gguf_file})
    samples = {"image": torch.randn(1, 3, 28, 28), "text_input": ["an apple"]}
    loss, gradient = loss_and_gradient(model, samples)
    model.llama_model = load_llm(llm_folder, torch.device("cpu"), torch.float32)
    expected_loss, expected_gradient = loss_and_gradient(model, samples)
    torch.testing.assert_close(loss["loss"], expected_loss["loss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("load_in", ["8bit", "4bit", "8bit_weights"])
def test_a_gguf_file_is_quantized_as_its_folder_is(gguf_file, llm_folder, load_in):
    cpu = torch.device("cpu")
    actual, expected = (load_llm(path, cpu, torch.float32, load_in).state_dict() for path in (gguf_file, llm_folder))
    assert actual.keys() == expected.keys()
    assert {value.dtype for value in actual.values()} - {torch.float32} == {
        torch.uint8 if load_in == "4bit" else torch.int8
    }
    for name, value in actual.items():
        difference = (value.int() - expected[name].int()).abs() if value.dtype == torch.int8 else 0
        torch.testing.assert_close(value, expected[name]) if value.dtype != torch.int8 else None
        assert torch.as_tensor(difference).max() <= 1


def test_a_gguf_file_is_read_as_transformers_reads_it(gguf_file, monkeypatch):
    """Also where transformers has another way to read the architecture."""
    from transformers import AutoModelForCausalLM

    path = Path(gguf_file)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ours = [load_llm(gguf_file, torch.device("cpu"), torch.float32)]
    monkeypatch.setattr(compat, "gguf_processor", lambda architecture, config: None)
    ours += [load_llm(gguf_file, torch.device("cpu"), torch.float32, load_in) for load_in in ("16bit", "8bit")]
    for llm in ours[:2]:
        assert llm.state_dict().keys() == theirs.state_dict().keys()
        assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in llm.state_dict().items())
        assert (llm.config.vocab_size, llm.config.tie_word_embeddings) == (256, theirs.config.tie_word_embeddings)
    assert ours[2].model.layers[0].mlp.up_proj.weight.dtype == torch.int8


@pytest.mark.parametrize("load_in", ["16bit", "8bit", "8bit_weights"])
def test_a_number_in_a_gguf_file_that_is_not_finite(gguf_file, tmp_path, load_in):
    from minigpt4.weights import gguf

    content = bytearray(Path(gguf_file).read_bytes())
    start = gguf.read_header(gguf_file).tensors["blk.1.ffn_up.weight"].start
    content[start : start + 4] = struct.pack("<f", float("nan"))
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"NaN or infinity among the numbers of model\.layers\.1\.mlp\.up_proj"):
        load_llm(str(tmp_path / "a.gguf"), torch.device("cpu"), torch.float32, load_in)


def test_a_gguf_files_vocabulary_is_read_once(gguf_file, monkeypatch):
    """gguf's own reader takes seconds for one, and its table of names milliseconds for each module of a model."""
    import gguf

    opened, tables, table_of = [], [], gguf.get_tensor_name_map

    class Reader(gguf.GGUFReader):
        def __init__(self, path, *args, **kwargs):
            opened.append(Path(path).stat().st_size)
            super().__init__(path, *args, **kwargs)

    monkeypatch.setattr(gguf, "GGUFReader", Reader)
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *args: tables.append(args) or table_of(*args))
    assert embedding_dim(gguf_file) == 128
    llm, tokenizer = load_llm(gguf_file, torch.device("cpu"), torch.float32), load_tokenizer(gguf_file)
    check_answers(llm, tokenizer, gguf_file)
    assert max(opened, default=0) < 5000 < Path(gguf_file).stat().st_size
    assert len(tables) == 1


def test_a_part_of_a_gguf_file_and_a_hostile_header(tmp_path):
    gguf = pytest.importorskip("gguf")
    for name, value, message in (("split.count", 3, "one of 3 parts"), ("general.alignment", 0, "damaged")):
        writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
        writer.add_uint32(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        with pytest.raises(ConfigError, match=message):
            load_llm(str(tmp_path / "a.gguf"), torch.device("cpu"), torch.float32)


def test_what_is_wrong_with_a_gguf_file(gguf_file, tmp_path):
    whole = Path(gguf_file).read_bytes()
    for content, message in (
        (whole[:-100], "cut off or damaged"),
        (whole[:3000], "cut off or damaged"),
        (whole[:10], "cut off or damaged"),
        (b"", "cut off or damaged"),
        (b"<html>" + whole[6:], "no .gguf file"),
        (whole[:4] + b"\x09" + whole[5:], "GGUF version 9"),
        (whole[:16] + b"\xff" * 8 + whole[24:], "cut off or damaged"),
        (whole.replace(b"general.architecture", b"general.architectuer"), "cannot be loaded|None"),
    ):
        (tmp_path / "a.gguf").write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            load_llm(str(tmp_path / "a.gguf"), torch.device("cpu"), torch.float32)


def test_a_gguf_file_without_the_package(gguf_file, monkeypatch):
    monkeypatch.setattr(llm_module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install gguf"):
        embedding_dim(gguf_file)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("load_in", ["16bit", "8bit", "4bit", "8bit_weights"])
def test_numbers_that_are_not_finite_raise(llm_folder, tmp_path, load_in, number):
    shutil.copytree(llm_folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 3] = number
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"NaN or infinity among the numbers of model\.layers\.1\.mlp\.up_proj"):
        load_llm(str(tmp_path), torch.device("cpu"), torch.float32, load_in)


def test_a_bin_file_that_differs_from_its_checksums_raises(llm_folder, tmp_path):
    weights = load_file(Path(llm_folder) / "model.safetensors")
    shutil.copy(Path(llm_folder) / "config.json", tmp_path)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    load_llm(str(tmp_path), torch.device("cpu"), torch.float32)
    content = bytearray((tmp_path / "pytorch_model.bin").read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of a weight, which stays finite
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    for load_in in ("16bit", "8bit"):
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is damaged"):
            load_llm(str(tmp_path), torch.device("cpu"), torch.float32, load_in)


@pytest.fixture
def folder_with_code(llm_folder, tmp_path):
    """A Llama under a model type that transformers does not know, with the code for it, which leaves a mark."""
    shutil.copytree(llm_folder, tmp_path / "model")
    mark = tmp_path / "mark"
    (tmp_path / "model/code_of_strangers.py").write_text(
        "from pathlib import Path\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(mark)!r}).touch()\n"
        "class StrangeConfig(LlamaConfig):\n    model_type = 'strange'\n"
        "class StrangeForCausalLM(LlamaForCausalLM):\n    config_class = StrangeConfig\n"
    )
    config = json.loads((tmp_path / "model/config.json").read_text())
    classes = {"AutoConfig": "StrangeConfig", "AutoModelForCausalLM": "StrangeForCausalLM"}
    auto_map = {auto: f"code_of_strangers.{name}" for auto, name in classes.items()}
    config |= {"model_type": "strange", "architectures": ["StrangeForCausalLM"], "auto_map": auto_map}
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    return str(tmp_path / "model"), mark


def test_a_models_own_code_runs_only_if_it_is_trusted(folder_with_code, monkeypatch, tmp_path):
    folder, mark = folder_with_code
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *args: "y")  # nobody is asked
    for read in (embedding_dim, lambda path: load_llm(path, torch.device("cpu"), torch.float32)):
        with pytest.raises(ConfigError, match=r"--options model\.trust_remote_code=True"):
            read(folder)
    assert not mark.exists()
    assert embedding_dim(folder, trust_remote_code=True) == 128
    llm = load_llm(folder, torch.device("cpu"), torch.float32, trust_remote_code=True)
    assert mark.exists() and type(llm).__name__ == "StrangeForCausalLM"


def test_transformers_is_told_whom_to_trust_wherever_it_could_ask():
    """Each call of an Auto class's `from_pretrained` says so."""
    users = {
        path.relative_to(ROOT).as_posix(): path.read_text().count(".from_pretrained(")
        for path in ROOT.glob("minigpt4/**/*.py")
        if ".from_pretrained(" in path.read_text()
    }
    # The tokenizer calls ours, and one of the calls is of a class that is no Auto class.
    assert users == {"minigpt4/models/llm.py": 1, "minigpt4/models/tokenizer.py": 2, "minigpt4/weights/gguf.py": 4}
    for path in ("minigpt4/models/llm.py", "minigpt4/weights/gguf.py"):
        said = re.findall(r'trust_remote_code(?:=|": False)', (ROOT / path).read_text())
        assert len(said) >= users[path] - 1


def test_logits_that_are_not_finite_raise(llm_folder, golden_llm_folder):
    llm = load_llm(llm_folder, torch.device("cpu"), torch.float32)
    tokenizer = load_tokenizer(str(golden_llm_folder))
    llm.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"model llama .*logits .*not finite"):
        check_answers(llm, tokenizer, "llama")


def test_a_model_that_guesses_is_logged(llm_folder, golden_llm_folder, caplog):
    llm = load_llm(llm_folder, torch.device("cpu"), torch.float32)
    check_answers(llm, load_tokenizer(str(golden_llm_folder)), "llama")
    assert re.search("model llama .*ln V = 5.55.*never merged", caplog.text)


def test_a_model_that_knows_english_is_not_logged(caplog):
    llm = load_llm(TINY, torch.device("cpu"), torch.float32)
    check_answers(llm, load_tokenizer(TINY), TINY)
    assert "ln V" not in caplog.text


@pytest.mark.parametrize(("load_in", "loss_within", "least_cosine"), [("8bit", 0.02, 0.999), ("4bit", 0.1, 0.85)])
def test_the_tiny_default_trains_in_low_bit(load_in, loss_within, least_cosine):
    """The loss within 2 or 10 %, and the direction of the projection's gradient; 4 bit changes a small network more."""
    pytest.importorskip("bitsandbytes")
    from types import SimpleNamespace

    from PIL import Image

    from minigpt4.common.config import Config
    from minigpt4.models import MiniGPT4
    from minigpt4.processors import Blip2ImageEvalProcessor

    captions = ["cat face", "red apple", "sailboat", "automobile"]
    processor = Blip2ImageEvalProcessor(64)
    files = sorted((ROOT / "minigpt4/assets/examples/emoji").iterdir())
    pictures = [processor(Image.open(path).convert("RGB")) for path in files]
    samples = {"image": torch.stack(pictures), "text_input": captions}
    losses, gradients = [], []
    for precision in ("16bit", load_in):
        stage1 = ROOT / "minigpt4/assets/tiny/stage1.safetensors"
        options = [f"model.load_in={precision}", f"model.ckpt={stage1}", "model.prompt_path=null"]
        cfg = Config(SimpleNamespace(cfg_path=ROOT / "eval_configs/minigpt4_tiny_eval.yaml", options=options))
        model = MiniGPT4.from_config(cfg.model_cfg)
        model.end_sym = "\n"
        loss = model(samples)["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.llama_proj.weight.grad.flatten())
    assert losses[1] == pytest.approx(losses[0], rel=loss_within)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > least_cosine


def test_device_map(llm_folder, monkeypatch):
    """Without a GPU, "auto" puts everything on the host; the answers are the same."""
    cpu, asked, read = torch.device("cpu"), [], llm_module._read

    def recording(*args, device_map, **how):
        asked.append(device_map)
        return read(*args, device_map=device_map, **how)

    monkeypatch.setattr(llm_module, "_read", recording)
    embeds = torch.randn(1, 5, 128)
    spread, plain = (load_llm(llm_folder, cpu, torch.float32, device_map=device_map) for device_map in ("auto", None))
    assert asked == ["auto", {"": cpu}]
    torch.testing.assert_close(run(spread, embeds)[0], run(plain, embeds)[0])


def test_auto_keeps_a_small_model_beside_the_vision_side(llm_folder, monkeypatch):
    """accelerate would put all of a small model on the last of two GPUs; it is then loaded onto the first."""
    cpu, asked, read = torch.device("cpu"), [], llm_module._read
    weight = SimpleNamespace(device=torch.device("cpu", 1))
    elsewhere = SimpleNamespace(
        get_input_embeddings=lambda: SimpleNamespace(weight=weight), parameters=lambda: iter([weight]), modules=list
    )

    def balancing(*args, device_map, **how):
        asked.append(device_map)
        return elsewhere if device_map == "auto" else read(*args, device_map=device_map, **how)

    monkeypatch.setattr(llm_module, "_read", balancing)
    llm = load_llm(llm_folder, cpu, torch.float32, device_map="auto")
    assert asked == ["auto", {"": cpu}]
    assert {p.device for p in llm.parameters()} == {cpu}
    weight.device = torch.device("meta")  # a device of another kind: the GPU has no room
    with pytest.raises(ConfigError, match=r"model\.llm_device_map=auto .*meta"):
        load_llm(llm_folder, cpu, torch.float32, device_map="auto")


def test_a_model_on_several_devices_keeps_bitsandbytes_layers(llm_folder, monkeypatch):
    pytest.importorskip("bitsandbytes")
    read = llm_module._read

    def spreading(*args, device_map, **how):
        llm = read(*args, device_map={"": "cpu"}, **how)
        llm.lm_head.to("meta")
        return llm

    monkeypatch.setattr(llm_module, "_read", spreading)
    llm = load_llm(llm_folder, torch.device("cpu"), torch.float32, "8bit", "auto")
    assert has_bitsandbytes_layers(llm)


@pytest.mark.parametrize("kind", ["fp4", "nested"])
def test_other_formats_of_bitsandbytes_train_alike_after_a_validation(llm_folder, tmp_path, kind):
    """A folder that is quantized already keeps its format, whatever `load_in` says."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = {"bnb_4bit_quant_type": "fp4" if kind == "fp4" else "nf4", "bnb_4bit_use_double_quant": kind == "nested"}
    config = BitsAndBytesConfig(load_in_4bit=True, **how)
    AutoModelForCausalLM.from_pretrained(
        llm_folder, quantization_config=config, device_map={"": "cpu"}
    ).save_pretrained(tmp_path)
    full = run(load_llm(llm_folder, torch.device("cpu"), torch.float32), embeds := torch.randn(2, 7, 128) * 0.02)
    for load_in in ("16bit", "4bit"):
        llm = load_llm(str(tmp_path), torch.device("cpu"), torch.float32, load_in)
        assert has_bitsandbytes_layers(llm)
        before = run(llm, embeds)
        assert torch.cosine_similarity(before[0].flatten(), full[0].flatten(), dim=0) > 0.95
        with torch.no_grad():
            llm(inputs_embeds=embeds)
        for first, second in zip(before, run(llm, embeds), strict=True):
            torch.testing.assert_close(first, second)


def test_device_maps_that_are_refused(llm_folder, monkeypatch):
    with pytest.raises(ConfigError, match=r"model\.load_in=8bit_weights .*model\.llm_device_map"):
        load_llm(llm_folder, torch.device("cpu"), torch.float32, "8bit_weights", "auto")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match=r"model\.llm_device_map=auto .*2 processes"):
        load_llm(llm_folder, torch.device("cpu"), torch.float32, device_map="auto")
