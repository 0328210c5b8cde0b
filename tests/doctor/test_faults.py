"""A healthy run passes; with one fault planted, doctor names it and the fix."""

import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from dataset_files import good_members, picture_bytes, write_tar
from safetensors.torch import load_file, save_file

from minigpt4.benchmarks import published
from minigpt4.common import gpus
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.datasets import feature_cache
from minigpt4.doctor import check_environment, check_files, check_memory, check_run, check_tokenizer, checks, machine
from minigpt4.doctor.diagnostic import ERROR, WARNING
from minigpt4.doctor.machine import Gpu
from minigpt4.models import fitting
from minigpt4.models.template import TEMPLATES
from minigpt4.weights import hf_names, locate

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n"


@pytest.mark.parametrize("stage", ["stage1", "stage2", "chat"])
def test_a_healthy_run_passes(patient, stage):
    patient.stage = stage
    assert patient.diagnostics(ERROR, WARNING) == []
    assert {f.check for f in patient.diagnostics()} >= {"paths", "libraries", "GPU", "GPU memory", "tokenizer"}


def test_a_sample_of_each_source_is_shown(patient):
    patient.stage = "stage1"
    patient.options = [f"{LAION}=[{patient.shards}/*.tar,'pipe:cat {patient.shards}/00002.tar']"]
    found = [f.what for f in patient.diagnostics() if f.check == LAION]
    assert len(found) == 2 and found[0].startswith("3 shards; opened 3; a sample: 0000")
    assert found[1] == "1 shard; opened 1; a sample: 00002.tar/000000008: 'sample 8'"
    patient.stage, patient.options = "stage2", []
    (what,) = [f.what for f in patient.diagnostics() if f.check == ALIGN]
    assert what == "20 records; a sample: 0: 'Caption Number 0!'"


def rename(path):
    path.rename(path.with_name("elsewhere"))


def shards(p):
    """The language model's weights in two shards, with an index."""
    weights = load_file(p.llm / "model.safetensors")
    names = sorted(weights)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, half in halves.items():
        save_file({name: weights[name] for name in half}, p.llm / file)
    (p.llm / "model.safetensors").unlink()
    weight_map = {name: file for file, half in halves.items() for name in half}
    p.write(p.llm / "model.safetensors.index.json", json.dumps({"weight_map": weight_map}))


def missing_shard(p):
    shards(p)
    (p.llm / "b.safetensors").unlink()


def pointer_among_shards(p):
    shards(p)
    p.write(p.llm / "b.safetensors", LFS)


def no_weights(p):
    (p.llm / "model.safetensors").unlink()


def no_tokenizer(p):
    (p.llm / "tokenizer.model").unlink()


def tokenizer_of_another(p):
    """One with more tokens than the model embeds."""
    p.edit(p.llm / "config.json", vocab_size=1000)
    weights = load_file(p.llm / "model.safetensors")
    cut = {"model.embed_tokens.weight", "lm_head.weight"}
    (p.llm / "model.safetensors").unlink()
    small = {name: value[:1000].clone() if name in cut else value for name, value in weights.items()}
    save_file(small, p.llm / "model.safetensors")


def tokenizer_without_separator(p):
    """A word-level tokenizer: ### is unknown to it."""
    (p.llm / "tokenizer.model").unlink()
    model = {"type": "WordLevel", "vocab": {"<unk>": 0, "a": 1}, "unk_token": "<unk>"}
    p.write(p.llm / "tokenizer.json", json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


def infinite_encoder(p):
    content = torch.load(p.vision, weights_only=True)
    content["pos_embed"][0, 0, 0] = float("inf")
    torch.save(content, replace(p.vision))


def flipped_bytes(p):
    content = bytearray(p.qformer.read_bytes())
    content[len(content) // 2] ^= 1
    p.write(p.qformer, bytes(content))


def own_code(p):
    p.edit(p.llm / "config.json", model_type="strange", auto_map={"AutoConfig": "a.StrangeConfig"})
    p.write(p.llm / "a.py", "raise SystemExit('this code was run')")


def options(*given):
    return lambda p: p.options.extend(given)


def prompts(text):
    def plant(p):
        p.write(p.folder / "prompts.txt", text)
        p.options += [f"model.prompt_path={p.folder}/prompts.txt"]

    return plant


def checkpoint(tensors, **more):
    def plant(p):
        p.ckpt.unlink()
        torch.save({"model": tensors, **more}, p.ckpt)

    return plant


def linear(width_in, width_out):
    return {"llama_proj.weight": torch.zeros(width_out, width_in), "llama_proj.bias": torch.zeros(width_out)}


def all_tars(content):
    def plant(p):
        for path in p.shards.glob("*.tar"):
            p.write(path, content)

    return plant


def tar_of(members) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return write_tar(Path(folder) / "0.tar", members).read_bytes()


def caption(text):
    """Gives the first record this caption."""

    def change(content):
        content["annotations"][0]["caption"] = text
        return content

    return change


def broken_cache(p):
    folder = p.folder / "cache"
    feature_cache.open_cache(folder, {"made_by": {}, "shape": [4, 6], "parts": 1})
    write_tar(folder / "00000.tar", [("a.npy", b"x"), ("a.json", b'{"caption": "c", "image_id": "i"}')])
    p.options.append(f"{ALIGN_FEATURES}={folder}")


def another_bundle(p):
    """A Q-Former's file for a wider encoder."""
    content = torch.load(p.qformer, weights_only=True)
    content["model"]["ln_vision.weight"] = torch.zeros(72)
    p.qformer.unlink()
    torch.save(content, p.qformer)


def more_queries(p):
    content = torch.load(p.qformer, weights_only=True)
    content["model"]["query_tokens"] = torch.zeros(1, 40, content["model"]["query_tokens"].shape[2])
    p.qformer.unlink()
    torch.save(content, p.qformer)


def vision_to_hf(state: dict) -> dict:
    """An encoder's weights under the names of a Hugging Face folder: the inverse of `hf_names.vision_from_hf`."""
    state = dict(state)
    for name in [name for name in state if name.endswith("attn.q_bias")]:
        q, v = state.pop(name), state.pop(name.replace("q_bias", "v_bias"))
        state[name.replace("q_bias", "qkv.bias")] = torch.cat([q, torch.zeros_like(q), v])
    rules = [
        (re.escape(ours).replace(r"\#", r"(\d+)"), theirs.replace("#", r"\1")) for theirs, ours in hf_names.VISION_NAMES
    ]
    renamed = {}
    for name, value in state.items():
        rule = next((rule for rule in rules if re.match(rule[0], name)), None)
        if rule:
            renamed[re.sub(*rule, name, count=1)] = value
    return renamed


def vision_in_a_folder(p):
    """The encoder as a BLIP-2's folder in Hugging Face format."""
    weights = torch.load(p.vision, weights_only=True)
    p.vision = p.folder / "blip2"
    p.vision.mkdir()
    save_file({name: t.contiguous() for name, t in vision_to_hf(weights).items()}, p.vision / "model.safetensors")


def records(change):
    def plant(p):
        path = p.align / "filter_cap.json"
        p.write(path, json.dumps(change(json.loads(path.read_text()))))

    return plant


def gpu(**change):
    def plant(p):
        p.gpus = [Gpu(**{"name": "a GPU", "capability": (9, 0), "total": 80 * 10**9, "free": 80 * 10**9, **change})]

    return plant


def no_gpu(p):
    p.gpus = []


def also(*plants):
    return lambda p: [plant(p) for plant in plants]


LLM = "model.llama_model"
ALIGN_PROCESSOR = "datasets.cc_sbu_align.vis_processor.train"
ALIGN = "datasets.cc_sbu_align.build_info.storage"
ALIGN_FEATURES = "datasets.cc_sbu_align.build_info.features"
LAION = "datasets.laion.build_info.storage"
SIZES = published.SIZES["small"]
# name: (stage, what is done to the run, status, key, a part of what doctor says)
FAULTS = {
    # paths
    "llm missing": ("chat", lambda p: rename(p.llm), ERROR, LLM, "does not exist"),
    "ckpt missing": ("stage2", lambda p: p.ckpt.unlink(), ERROR, "model.ckpt", "does not exist"),
    "prompts missing": ("stage2", options("model.prompt_path=/no"), ERROR, "model.prompt_path", "does not exist"),
    "llm is a file": ("chat", lambda p: setattr(p, "llm", p.ckpt), ERROR, LLM, "it is a file"),
    "llm is a pointer": (
        "chat",
        also(lambda p: p.write(p.folder / "llm", LFS), lambda p: setattr(p, "llm", p.folder / "llm")),
        ERROR,
        LLM,
        "Git-LFS pointer",
    ),
    "ckpt is a folder": ("stage2", lambda p: setattr(p, "ckpt", p.align), ERROR, "model.ckpt", "checkpoint_N"),
    "encoder is a folder": ("stage1", lambda p: setattr(p, "vision", p.align), ERROR, "model.vit_weights", "folder"),
    # weights
    "vision is a pointer": ("stage1", lambda p: p.write(p.vision, LFS), ERROR, "model.vit_weights", "Git-LFS"),
    "ckpt is empty": ("stage2", lambda p: p.write(p.ckpt, b""), ERROR, "model.ckpt", "is empty"),
    "ckpt is cut off": ("stage2", lambda p: p.cut(p.ckpt, 0.7), ERROR, "model.ckpt", "cannot be read"),
    "ckpt is a page": ("stage2", lambda p: p.write(p.ckpt, "<html>"), ERROR, "model.ckpt", "web page"),
    "vision is cut off": ("stage1", lambda p: p.cut(p.vision, 0.7), ERROR, "model.vit_weights", "truncated"),
    "llm is cut off": ("chat", lambda p: p.cut(p.llm / "model.safetensors", 0.7), ERROR, LLM, "cut"),
    "no config.json": ("chat", lambda p: rename(p.llm / "config.json"), ERROR, LLM, "config.json"),
    "config.json is a pointer": ("chat", lambda p: p.write(p.llm / "config.json", LFS), ERROR, LLM, "Git-LFS"),
    "missing shard": ("chat", missing_shard, ERROR, LLM, "1 of 2 shards: b.safet"),
    "pointer among shards": ("chat", pointer_among_shards, ERROR, LLM, "b.safetensors.*Git-LFS"),
    "no weights": ("chat", no_weights, ERROR, LLM, "holds no weights"),
    "unknown architecture": (
        "chat",
        lambda p: p.edit(p.llm / "config.json", model_type="nobody's"),
        ERROR,
        LLM,
        "nobody's",
    ),
    "broken index": ("chat", lambda p: p.write(p.llm / "model.safetensors.index.json", "{"), ERROR, LLM, "index.json"),
    "NaN in ckpt": (
        "stage2",
        checkpoint({"llama_proj.weight": torch.full((128, SIZES["qformer_width"]), float("nan"))}),
        ERROR,
        "model.ckpt",
        "NaN .*llama_proj.weight",
    ),
    "infinity in the encoder": ("stage1", infinite_encoder, ERROR, "model.vit_weights", "infinity .* pos_embed"),
    "flipped bytes": ("stage1", flipped_bytes, ERROR, "model.q_former_model", "is damaged"),
    "objects in ckpt": ("stage2", checkpoint({"llama_proj.weight": [0.0]}), ERROR, "model.ckpt", "is a list"),
    "a number as ckpt's epoch": (
        "stage2",
        also(checkpoint(linear(48, 128), epoch="3"), lambda p: p.options.append(f"run.resume_ckpt_path={p.ckpt}")),
        ERROR,
        "run.resume_ckpt_path",
        "'epoch' is of type str",
    ),
    "code in the model's folder": ("chat", own_code, ERROR, LLM, "model.trust_remote_code=True"),
    "code that is trusted": (
        "chat",
        also(lambda p: p.write(p.llm / "a.py", ""), options("model.trust_remote_code=True")),
        WARNING,
        "model.trust_remote_code",
        "a.py of",
    ),
    # shapes
    "13B projection": ("stage2", checkpoint(linear(SIZES["qformer_width"], 5120)), ERROR, "model.ckpt", "5120 .* 128"),
    "another Q-Former's": ("stage2", checkpoint(linear(99, 128)), ERROR, "model.ckpt", r"\(128, 99\)"),
    "no projection": ("chat", checkpoint({"x": torch.zeros(2)}), ERROR, "model.ckpt", "llama_proj.weight"),
    "queries": ("stage1", more_queries, ERROR, "model.num_query_token", r"\(1, 40, 48\)"),
    "Q-Former's width": ("stage1", options("model.qformer.hidden_size=96"), ERROR, "model.qformer", ""),
    "two bundles": ("stage1", another_bundle, ERROR, "model.q_former_model", r"ln_vision.weight.*\(72,\)"),
    "encoder's width": ("stage1", options("model.vit_model.embed_dim=32"), ERROR, "model.vit_model", r"\(64,\)|, 64"),
    "encoder's depth": ("stage1", options("model.vit_model.depth=9"), ERROR, "model.vit_model", "blocks.[3-8]"),
    "folder of another encoder": (
        "stage1",
        also(vision_in_a_folder, options("model.vit_model.depth=9")),
        ERROR,
        "model.vit_model",
        "blocks.[3-8]",
    ),
    "encoder's name": ("chat", options("model.vit_model=eva_h"), ERROR, "model.vit_model", "eva_h"),
    "no encoder": ("chat", options("model.vit_weights=published"), ERROR, "model.vit_weights", ""),
    "image size": ("stage1", options("model.image_size=230"), ERROR, "model.image_size", "230"),
    "processor's size": (
        "stage2",
        options(f"{ALIGN_PROCESSOR}.image_size=448"),
        ERROR,
        f"{ALIGN_PROCESSOR}.image_size",
        "448",
    ),
    # texts
    "no tokenizer": ("chat", no_tokenizer, ERROR, LLM, "tokenizer.model"),
    "broken tokenizer": ("chat", lambda p: p.write(p.llm / "tokenizer.model", b"garbage"), ERROR, LLM, "tokenizer"),
    "another tokenizer": ("chat", tokenizer_of_another, ERROR, LLM, "32000.* 1000"),
    "separator": ("chat", tokenizer_without_separator, ERROR, "model.end_sym", "###"),
    "no room for text": ("stage2", options("model.max_txt_len=2"), ERROR, "model.max_txt_len", "2 "),
    "template": ("stage2", options("model.prompt_template=Hi"), ERROR, "model.prompt_template", "Hi"),
    "no slot": ("stage2", prompts("Describe.\n"), ERROR, "model.prompt_path", "<ImageHere>"),
    "two slots": ("stage2", prompts("<ImageHere><ImageHere>"), ERROR, "model.prompt_path", "2 times"),
    "end_sym": ("stage2", options("model.end_sym=x"), WARNING, "model.end_sym", "'x'"),
    # data
    "no folder of shards": ("stage1", lambda p: rename(p.shards), ERROR, LAION, "does not exist"),
    "no shards": ("stage1", lambda p: [s.unlink() for s in p.shards.iterdir()], ERROR, LAION, "no file matches"),
    "a shard is missing": (
        "stage1",
        lambda p: p.options.append(f"{LAION}={p.shards}/{{00000..00009}}.tar"),
        ERROR,
        LAION,
        "^(?!datasets).*7 of 10 shards",
    ),
    "a cut shard": ("stage1", lambda p: p.cut(p.shards / "00001.tar", 0.5), WARNING, LAION, "00001.tar: it is cut off"),
    "shards of pointers": ("stage1", all_tars(LFS), ERROR, LAION, "3 shards"),
    "shards of rubbish": ("stage1", all_tars(b"rubbish" * 500), WARNING, LAION, "it is no tar"),
    "an empty shard": ("stage1", lambda p: write_tar(replace(p.shards / "00000.tar"), []), WARNING, LAION, "samples"),
    "shards without captions": (
        "stage1",
        all_tars(tar_of([("a.png", picture_bytes(0))])),
        WARNING,
        LAION,
        "no usable sample: 1 × a sample without caption",
    ),
    "shards without usable captions": (
        "stage1",
        all_tars(tar_of([("a.png", picture_bytes(0)), ("a.json", b'{"caption": "\\ud83d"}')])),
        ERROR,
        LAION,
        "none of 3 shards can be used",
    ),
    "pictures that are none": (
        "stage1",
        all_tars(tar_of([("a.png", b"<html>"), ("a.txt", b"text")])),
        WARNING,
        LAION,
        "no usable sample: 1 × an image that is not one",
    ),
    "some captions that cannot be used": (
        "stage1",
        all_tars(tar_of([*good_members(0, 3), ("a.png", picture_bytes(0)), ("a.txt", "é".encode("latin-1"))])),
        WARNING,
        LAION,
        "3 of 12 samples looked at: a caption that is not in UTF-8",
    ),
    "nothing is left of a caption": (
        "stage1",
        all_tars(tar_of([*good_members(0, 3), ("a.png", picture_bytes(0)), ("a.txt", b"...")])),
        WARNING,
        LAION,
        "3 of 12 samples looked at: an empty caption, after text_processor",
    ),
    "a command that fails": ("stage1", options(f"{LAION}=pipe:false"), WARNING, LAION, "pipe:false: no usable sample"),
    "one source of two": (
        "stage1",
        lambda p: p.options.append(f"{LAION}=[{p.shards}/00000.tar,'pipe:false']"),
        ERROR,
        LAION,
        "none of 1 shard can be used, e.g. pipe:false",
    ),
    "empty captions": ("stage2", records(caption("")), WARNING, ALIGN, "1 of 20 samples looked at: an empty caption"),
    "markers in captions": (
        "stage2",
        records(caption("a ### b")),
        WARNING,
        "datasets.cc_sbu_align",
        "1 of 20 samples looked at: markers .*'a ### b'",
    ),
    "broken cached features": ("stage2", broken_cache, ERROR, ALIGN_FEATURES, "1 × features that are broken"),
    "no align folder": ("stage2", lambda p: rename(p.align), ERROR, ALIGN, "does not exist"),
    "align is a file": ("stage2", lambda p: setattr(p, "align", p.ckpt), ERROR, ALIGN, "is a file"),
    "no list": ("stage2", lambda p: rename(p.align / "filter_cap.json"), ERROR, ALIGN, "filter_cap.json"),
    "list is a pointer": ("stage2", lambda p: p.write(p.align / "filter_cap.json", LFS), ERROR, ALIGN, "Git-LFS"),
    "no pictures": ("stage2", lambda p: rename(p.align / "image"), ERROR, ALIGN, "image"),
    "a missing picture": ("stage2", lambda p: rename(p.align / "image" / "3.jpg"), ERROR, ALIGN, "1 of 20 records"),
    "a list of another form": ("stage2", records(lambda c: c["annotations"]), ERROR, ALIGN, "annotations"),
    "small dataset": ("stage2", options("run.batch_size_train=30"), ERROR, ALIGN, "20 records"),
    "small for its GPUs": ("stage2", lambda p: setattr(p, "world_size", 2), ERROR, ALIGN, "10 for each process"),
    "no features": (
        "stage2",
        options("datasets.cc_sbu_align.build_info.features=/no/cache"),
        ERROR,
        "datasets.cc_sbu_align.build_info.features",
        "/no/cache",
    ),
    # machine
    "no bf16": (
        "stage1",
        also(gpu(capability=(7, 5)), options("run.amp_dtype=bf16")),
        ERROR,
        "run.amp_dtype",
        "bfloat16",
    ),
    "no 8 bit": ("chat", gpu(capability=(7, 0)), ERROR, "model.load_in", "7.5"),
    "no fp8": ("stage1", also(gpu(capability=(8, 9)), options("run.fp8=True")), ERROR, "run.fp8", "8.9"),
    "fp8 in 8 bit": ("stage1", options("run.fp8=True", "model.load_in=8bit"), ERROR, "run.fp8", "model.load_in=8bit"),
    "fp8 in float16": (
        "stage1",
        also(gpu(), options("run.fp8=True", "run.amp_dtype=fp16")),
        ERROR,
        "run.fp8",
        "run.amp_dtype=fp16",
    ),
    "fp8 in float32": (
        "stage1",
        also(gpu(), options("run.fp8=True", "run.amp=False")),
        ERROR,
        "run.fp8",
        "run.amp=False",
    ),
    "fp8 without a GPU": ("stage1", also(no_gpu, options("run.fp8=True")), ERROR, "run.fp8", "none was found"),
    "fp8 on the CPU": (
        "stage1",
        also(gpu(), options("run.fp8=True", "run.device=cpu")),
        ERROR,
        "run.fp8",
        "run.device is cpu",
    ),
    "an unknown schedule": ("stage1", options("run.lr_sched=cosine"), ERROR, "run.lr_sched", "linear_warmup_cosine_lr"),
    "an unknown runner": ("stage1", options("run.runner=runner_bass"), ERROR, "run.runner", "'runner_base'"),
    "an unknown image processor": (
        "stage2",
        options("datasets.cc_sbu_align.vis_processor.train={name: blip2_image_trian}"),
        ERROR,
        f"{ALIGN_PROCESSOR}.name",
        "'blip2_image_train'",
    ),
    "an unknown text processor": (
        "stage1",
        options("datasets.laion.text_processor.train.name=blip_capture"),
        ERROR,
        "datasets.laion.text_processor.train.name",
        "'blip_caption'",
    ),
    "an unknown device": ("stage1", options("run.device=tpu"), ERROR, "run.device", "'tpu'"),
    "an old GPU": ("stage1", gpu(capability=(6, 1)), WARNING, "GPU", "7.5"),
    "no GPU": ("stage1", no_gpu, WARNING, "GPU", "NVIDIA"),
    "fewer GPUs": ("stage1", lambda p: setattr(p, "world_size", 2), WARNING, "GPU", "2 processes on 1 GPU"),
    "too small": ("stage1", gpu(total=10**9), ERROR, "GPU memory", "1.0 GB"),
    "in use": ("stage1", gpu(free=10**8), WARNING, "GPU memory", "0.1 GB"),
    "warm-up": ("stage1", options("run.warmup_steps=900"), WARNING, "run.warmup_steps", "900"),
}


def replace(path):
    path.unlink()
    return path


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(patient, fault):
    stage, plant, status, key, evidence = FAULTS[fault]
    patient.stage = stage
    plant(patient)
    found = patient.diagnostics(ERROR, WARNING)
    assert any((d.check, d.status) == (key, status) and re.search(evidence, d.what, re.DOTALL) for d in found), found


def test_a_gguf_file(patient, tmp_path):
    """Its header is told, its sizes give the memory, and a checkpoint is compared with its embeddings."""
    path = write_gguf(tmp_path / "a.GGUF", patient.llm)
    patient.options.append(f"model.llama_model={path}")
    patient.stage = "stage2"
    found = {d.check: d for d in patient.diagnostics(ERROR, WARNING)}
    assert found == {}
    told = [d.what for d in patient.diagnostics() if d.check == "model.llama_model"]
    llm = json.loads((patient.llm / "config.json").read_text())
    sizes = f"llama, {llm['num_hidden_layers']} layers, {llm['hidden_size']} wide"
    assert sizes in told[0] and f"tokenizer llama with {llm['vocab_size']} tokens; no chat template" in told[0]
    whole = patient.context().llm
    patient.options[-1] = f"model.llama_model={patient.llm}"
    of_folder = patient.context().llm
    assert whole.parameter_counts() == of_folder.parameter_counts() and whole.kv_width == of_folder.kv_width
    patient.options[-1] = f"model.llama_model={path}"
    rows = torch.zeros(8, whole.width).half()
    other = {"name": "x", "width": whole.width, "layers": whole.layers, "vocabulary": whole.vocabulary}
    content = torch.load(patient.ckpt, weights_only=True) | {"llm_fingerprint": other | {"embedding_rows": rows}}
    torch.save(content, replace(patient.ckpt))
    assert any("token embeddings do not" in d.what for d in patient.diagnostics(ERROR))
    path.write_bytes(path.read_bytes()[:-1])
    assert any("cut off" in d.what and d.check == "model.llama_model" for d in patient.diagnostics(ERROR))


def write_gguf(path, folder):
    """The Llama of a folder as a .gguf file, as far as doctor looks at it: its tensors in any order of rows."""
    gguf = pytest.importorskip("gguf")
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    tokenizer = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    kinds = {tokenizer.IsUnknown: 2, tokenizer.IsControl: 3, tokenizer.IsByte: 6}
    ids = range(config["vocab_size"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([tokenizer.IdToPiece(i) for i in ids])
    writer.add_token_scores([tokenizer.GetScore(i) for i in ids])
    writer.add_token_types([next((kind for is_kind, kind in kinds.items() if is_kind(i)), 1) for i in ids])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight"}
    for name, value in load_file(folder / "model.safetensors").items():
        writer.add_tensor(names.get(name, name), value.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("form", ["a folder", "the format before 2020"])
def test_other_forms_of_weights(patient, form):
    if form == "a folder":
        vision_in_a_folder(patient)
    else:
        content = torch.load(patient.ckpt, weights_only=True)
        torch.save(content, replace(patient.ckpt), _use_new_zipfile_serialization=False)
    assert patient.diagnostics(ERROR, WARNING) == []


def test_checks_at_the_start_of_a_run(patient, monkeypatch):
    """Errors end the run, estimates only warn, and ranks other than 0 leave it to rank 0."""
    monkeypatch.setattr(checks, "list_gpus", lambda: [Gpu("a GPU", (9, 0), total=10**9, free=10**9)])
    cfg = patient.context().cfg
    assert checks.preflight(cfg, training=True) == []
    assert [d.check for d in checks.preflight(cfg, training=True, with_loaders=True)] == ["GPU memory"]
    checkpoint(linear(99, 128))(patient)
    with pytest.raises(ConfigError, match="model.ckpt"):
        checks.preflight(cfg, training=True, with_loaders=True)
    monkeypatch.setenv("RANK", "1")
    assert checks.preflight(cfg, training=True, with_loaders=True) == []


def not_installed(name):
    if name != "torch":
        raise check_environment.metadata.PackageNotFoundError
    return "2.11.0"


@pytest.mark.parametrize(
    ("module", "name", "value", "stage", "status", "check", "what"),
    [
        (check_run, "free_disk", lambda path: 10, "stage1", ERROR, "run.output_dir", "and 0.0 MB are free"),
        (check_run, "is_writable", lambda path: False, "stage1", ERROR, "run.output_dir", "cannot be written to"),
        (check_memory, "available_memory", lambda: 10**9, "stage1", WARNING, "host memory", "1.0 GB are free"),
        (check_environment, "find_spec", lambda name: None, "chat", ERROR, "libraries", "bitsandbytes"),
        (check_environment.metadata, "version", lambda name: "1.0", "chat", WARNING, "libraries", "torch 1.0"),
        (check_environment.metadata, "version", not_installed, "chat", ERROR, "libraries", "torchvision"),
        (check_environment.metadata, "version", lambda name: "2.14.1+cpu", "chat", ERROR, "GPU", "built for CPUs only"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_machine_that_will_not_do(patient, monkeypatch, module, name, value, stage, status, check, what):
    patient.stage = stage
    monkeypatch.setattr(module, name, value)
    found = patient.diagnostics(status)
    assert any(f.check == check and what in f.what and f.fix for f in found), found


@pytest.mark.parametrize(("name", "what"), [("wandb", "wandb, which is not installed"), ("wandbb", "'wandb'?")])
def test_a_tracker_that_is_not_there(patient, monkeypatch, name, what):
    patient.stage, patient.options = "stage1", [f"run.trackers=[{name}]"]
    monkeypatch.setattr(check_environment, "find_spec", lambda name: None if name == "wandb" else name)
    (found,) = [each for each in patient.diagnostics(ERROR) if each.check == "run.trackers"]
    assert what in found.what and found.fix


def test_too_little_shared_memory(patient, monkeypatch):
    usage = check_environment.shutil.disk_usage("/")._replace(free=10**7)
    monkeypatch.setattr(check_environment.shutil, "disk_usage", lambda path: usage)
    patient.stage = "stage1"
    (found,) = [f for f in patient.diagnostics(WARNING) if f.check == "shared memory"]
    assert "/dev/shm has 10 MB free" in found.what and "--shm-size" in found.fix


def test_a_model_too_large_for_the_host(patient, monkeypatch):
    patient.gpus = []
    monkeypatch.setattr(check_memory, "available_memory", lambda: 10**7)
    assert [f.check for f in patient.diagnostics(ERROR)] == ["host memory"]


def test_downloads(patient, monkeypatch, tmp_path):
    """What is not in the cache is announced; an error where nothing may be fetched, or there is no room."""
    patient.stage = "stage1"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    patient.options = ["model.q_former_model=https://example.org/blip2.pth"]
    (found,) = patient.diagnostics(ERROR, WARNING)
    assert found.status == WARNING and "blip2.pth is not in the cache and will be fetched" in found.what
    target = locate.cached_file("https://example.org/blip2.pth")
    assert f"Put the file of https://example.org/blip2.pth at {target}" in found.fix
    assert target.is_relative_to(tmp_path / "torch/hub/checkpoints") and target.name == "blip2.pth"

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "nothing may be fetched" in patient.diagnostics(ERROR)[0].what
    patient.options = ["model.llama_model=nobody/nothing"]
    assert "nobody/nothing is not in the hub's cache" in patient.diagnostics(ERROR)[0].what
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "will be fetched from the hub" in patient.diagnostics(WARNING)[0].what

    patient.options = ["model.q_former_model=https://example.org/blip2.pth"]
    monkeypatch.setattr(check_files, "free_disk", lambda path: -1)
    assert "will be fetched: 0.0 MB" in next(f.what for f in patient.diagnostics(ERROR) if "former" in f.check)


def test_another_language_model(patient):
    """Found before anything is loaded, from eight rows of the embeddings in the file."""
    rows = load_file(patient.llm / "model.safetensors")["model.embed_tokens.weight"]
    ids = [len(rows) >> shift for shift in range(1, 9)]
    own = {"name": "mine", "width": 128, "layers": 2, "vocabulary": len(rows), "prompt_template": "{}", "end_sym": "\n"}
    projection = linear(SIZES["qformer_width"], 128)
    checkpoint(projection, llm_fingerprint=own | {"embedding_rows": rows[ids].half()})(patient)
    assert patient.diagnostics(ERROR, WARNING) == []
    assert "was trained with this language model" in {f.what for f in patient.diagnostics()}

    checkpoint(projection, llm_fingerprint=own | {"embedding_rows": rows[ids].half().flip(0)})(patient)
    (found,) = patient.diagnostics(ERROR)
    assert found.check == "model.ckpt" and "trained with mine (128 wide" in found.what
    assert "token embeddings do not" in found.what and "model.allow_llm_mismatch=true" in found.fix
    patient.options = ["model.allow_llm_mismatch=true"]
    assert [f.status for f in patient.diagnostics(ERROR, WARNING)] == [WARNING]

    patient.options = []
    checkpoint(projection, llm_fingerprint=own | {"layers": 3, "embedding_rows": rows[ids].half()})(patient)
    assert "layers 2 instead of 3" in patient.diagnostics(ERROR)[0].what

    template = TEMPLATES["vicuna_v1"].record("vicuna_v1")
    checkpoint(projection, llm_fingerprint=own | template | {"embedding_rows": rows[ids].half()})(patient)
    (found,) = patient.diagnostics(ERROR)
    assert found.check == "model.template" and "USER: " in found.what


def test_cached_features_need_no_vision(patient, tmp_path):
    """Neither its files nor its memory."""
    usual = check_memory.estimate(patient.context())
    patient.options = [f"datasets.cc_sbu_align.build_info.features={tmp_path}"]
    patient.write(patient.vision, LFS)
    assert [d.check for d in patient.diagnostics(ERROR, WARNING)] == ["datasets.cc_sbu_align"]  # it is empty
    assert check_memory.estimate(patient.context()).weights < usual.weights


def test_a_check_that_fails_is_told(patient, monkeypatch):
    monkeypatch.setattr(check_environment.shutil, "disk_usage", lambda path: 1 / 0)
    assert any("ZeroDivisionError" in f.what for f in patient.diagnostics(WARNING))


def test_names_that_are_not_used(patient, monkeypatch):
    """Of a chat, and of pictures whose features are cached."""
    unknown = "datasets.cc_sbu_align.vis_processor.train.name=mine"
    patient.stage, patient.options = "chat", ["run.lr_sched=cosine", unknown]
    assert [f for f in check_run.check_registry(patient.context())] == []
    patient.stage, patient.options = "stage2", [unknown, "datasets.cc_sbu_align.build_info.features=/cache"]
    assert [f for f in check_run.check_registry(patient.context())] == []


def test_a_published_projection_with_another_vicuna(patient, monkeypatch):
    """Its small copy counts as published here."""
    shape = torch.load(patient.ckpt, weights_only=True)["model"]["llama_proj.weight"].shape
    monkeypatch.setattr(fitting, "WIDTHS", (shape[0],))
    monkeypatch.setattr(fitting, "QFORMER_WIDTH", shape[1])
    (found,) = check_tokenizer.check_fitting(patient.context())
    assert (found.check, found.status) == ("model.llama_model", WARNING) and "Vicuna v0" in found.what


def test_what_is_no_fault(patient, open_registry):
    """A pad token without an embedding; a processor of one's own; several machines."""
    patient.edit(patient.llm / "tokenizer_config.json", pad_token="[PAD]")
    patient.write(patient.llm / "added_tokens.json", json.dumps({"[PAD]": 32000}))
    mine = type("Mine", (), {"from_config": classmethod(lambda cls, _: cls())})
    registry.register_processor("mine")(mine)  # as a plug-in does, once imported
    patient.options = ["datasets.cc_sbu_align.vis_processor.train={name: mine}", "model.prompt_path=null"]
    patient.world_size = 2
    patient.options += ["run.batch_size_train=4"]
    context = patient.context()
    context.processes_here = 1
    assert [f for f in checks.examine(context) if f.status in (ERROR, WARNING)] == []


@pytest.mark.parametrize(
    ("platform", "load_in", "what"),
    [
        ("linux", "16bit", "this is no Mac"),
        ("darwin", "8bit", "is mps; model.load_in=8bit .* needs an NVIDIA GPU or a CPU"),
        ("darwin", "4bit", "is mps; model.load_in=4bit"),
        ("darwin", "16bit", None),
        ("darwin", "8bit_weights", None),
    ],
)
def test_an_apple_gpu(patient, monkeypatch, platform, load_in, what):
    """Told at the start too, where no NVIDIA GPU is seen."""
    patient.stage, patient.gpus = "chat", []
    patient.options = ["run.device=mps", f"model.load_in={load_in}"]
    seen = SimpleNamespace(platform=platform, version=check_environment.sys.version)
    monkeypatch.setattr(check_environment, "sys", seen)
    monkeypatch.setattr(checks, "list_gpus", lambda: [])
    found = [f for f in patient.diagnostics(ERROR) if f.check == "run.device"]
    assert len(found) == (what is not None)
    if what:
        assert re.search(what, found[0].what) and found[0].fix
        with pytest.raises(ConfigError, match=what):
            checks.preflight(patient.context().cfg, training=False)
    else:
        checks.preflight(patient.context().cfg, training=False)


def test_fp8_that_can_run(patient):
    patient.stage = "stage1"
    patient.options = ["run.fp8=True"]
    gpu()(patient)
    assert patient.diagnostics(ERROR, WARNING) == []


def test_fp8_without_a_gpu_stops_at_the_start(patient, monkeypatch):
    """train.py's cheap part, which leaves the lack of a GPU to the run itself, does not leave this one."""
    patient.stage = "stage1"
    monkeypatch.setattr(checks, "list_gpus", lambda: [])
    checks.preflight(patient.context().cfg, training=True)
    patient.options = ["run.fp8=True"]
    with pytest.raises(ConfigError, match="run.fp8: needs an NVIDIA GPU"):
        checks.preflight(patient.context().cfg, training=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpus_are_those_of_torch(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for index, gpu in enumerate(machine.list_gpus()):
        properties = torch.cuda.get_device_properties(index)
        assert (gpu.name, gpu.capability) == (properties.name, (properties.major, properties.minor))
        assert 0.9 < properties.total_memory / gpu.total < 1.02
        assert gpu.free <= gpu.total


def test_gpus_as_nvidia_smi_prints_them(monkeypatch):
    """A GPU that shares the host's memory prints none of its own."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    printed = SimpleNamespace(stdout="NVIDIA H200, 9.0, 143771, 143156\nNVIDIA GB10, 12.1, [N/A], [N/A]\n")
    monkeypatch.setattr(gpus.subprocess, "run", lambda *args, **kwargs: printed)
    monkeypatch.setattr(machine, "available_memory", lambda: 7)
    first, second = machine.list_gpus()
    assert first == Gpu("NVIDIA H200", (9, 0), total=143771 * 2**20, free=143156 * 2**20)
    assert second == Gpu("NVIDIA GB10", (12, 1), total=7, free=7)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert machine.list_gpus() == [second]
    printed.stdout = "Unable to determine the device handle\n" + printed.stdout.splitlines()[1]
    assert machine.list_gpus() == [second]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert machine.list_gpus() == []


def test_gpus_are_listed_without_torch(monkeypatch):
    """Whatever this machine has, the answer is a list; CUDA_VISIBLE_DEVICES hides all."""
    everything = machine.list_gpus()
    assert all(g.total > 10**9 and g.capability >= (3, 0) for g in everything)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.list_gpus() == []
