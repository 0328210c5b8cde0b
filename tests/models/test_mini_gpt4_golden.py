"""MiniGPT-4 against the numbers of the first release (tests/golden/README.md has the tolerances)."""

import json
import random

import pytest
import torch
from helpers import GOLDEN, QFORMER, VIT
from safetensors.torch import load_file

from minigpt4.models import MiniGPT4, prompt
from minigpt4.models.eva_vit import checkpoint_filter_fn, create_vit
from minigpt4.models.loading import cast_matrices
from minigpt4.models.qformer import QFormer
from minigpt4.models.template import read_prompts
from minigpt4.models.vision import LayerNorm

FORWARD_CASES = ["stage1", "stage2", "stage2_56px", "edge_eos_unk_empty", "single", "unfrozen"]


def assert_close(actual, expected, atol):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@pytest.mark.parametrize(("case", "image_size"), [("v28", 28), ("v56", 56)])
def test_vision(golden, build_golden_model, case, image_size):
    _, tensors = golden("vision")
    model = build_golden_model(image_size=image_size)
    image = tensors[f"{case}.image"]
    vit_output = model.visual_encoder(image)
    image_tokens = model.ln_vision(vit_output)
    hidden = model.Qformer(model.query_tokens.expand(len(image), -1, -1), image_tokens)
    embeds, mask = model.encode_img(image)
    assert_close(vit_output, tensors[f"{case}.vit_output"], 2e-4)
    assert_close(image_tokens, tensors[f"{case}.ln_vision_output"], 1e-4)
    assert_close(hidden, tensors[f"{case}.qformer_last_hidden_state"], 1e-4)
    assert_close(embeds, tensors[f"{case}.encode_img"], 2e-4)
    assert torch.equal(mask, tensors[f"{case}.encode_img_atts"])


def test_vision_layer_by_layer(golden, build_golden_model):
    _, tensors = golden("vision")
    model = build_golden_model()
    seen = {}

    def record(name):
        return lambda module, args, output: seen.__setitem__(name, output)

    for i, block in enumerate(model.visual_encoder.blocks):
        block.register_forward_hook(record(f"v28.vit_block_{i}"))
    model.Qformer.bert.embeddings.register_forward_hook(record("v28.qformer_hidden_0"))
    for i, layer in enumerate(model.Qformer.bert.encoder.layer):
        layer.register_forward_hook(record(f"v28.qformer_hidden_{i + 1}"))
    model.encode_img(tensors["v28.image"])
    assert len(seen) == 3 + 5
    for name, value in seen.items():
        expected = tensors[name]
        assert_close(value.expand_as(expected), expected, 2e-4)


@pytest.mark.parametrize(("start", "end"), [(28, 56), (28, 84), (56, 28)])
def test_position_embeddings_are_interpolated(golden, golden_weights, start, end):
    _, tensors = golden("vision")
    weights = golden_weights if start == 28 else load_file(GOLDEN / "tiny_weights_56_vision.safetensors")
    prefix = "visual_encoder."
    vit = create_vit(VIT, end)
    state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    vit.load_state_dict(checkpoint_filter_fn(state, vit))
    case = f"interp{start}to{end}"
    assert_close(vit.pos_embed.data, tensors[f"{case}.pos_embed"], 1e-5)
    assert_close(vit(tensors[f"{case}.image"]), tensors[f"{case}.vit_output"], 2e-4)


def test_norm_epsilons(golden, build_golden_model):
    _, tensors = golden("vision")
    model = build_golden_model()
    probes = sorted({key.rsplit(".", 1)[0] for key in tensors if key.startswith("norm_probe.")})
    assert len(probes) == 4
    for probe in probes:
        module = model.get_submodule(probe.removeprefix("norm_probe."))
        torch.testing.assert_close(module(tensors[f"{probe}.input"]), tensors[f"{probe}.output"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", FORWARD_CASES)
def test_training_forward_and_gradients(golden, build_golden_model, name):
    cases, tensors = golden("train_forward")
    assert sorted(FORWARD_CASES) == sorted(cases["forward_cases"])
    case = cases["forward_cases"][name]
    frozen = name != "unfrozen"
    model = build_golden_model(
        image_size=case["image_size"],
        max_txt_len=case["max_txt_len"],
        end_sym=case["end_sym"],
        freeze_vit=frozen,
        freeze_qformer=frozen,
    )
    model.prompt_list = [case["prompt"]] if case["prompt"] else []
    model.train()
    output = model({"image": tensors[f"{name}.image"], "text_input": case["text_input"]})
    output["loss"].backward()
    assert_close(output["loss"].detach(), tensors[f"{name}.loss"], 5e-5)
    assert output["num_labels"] == case["num_target_tokens"]
    expected = {k.removeprefix(f"{name}.grad."): v for k, v in tensors.items() if k.startswith(f"{name}.grad.")}
    gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() >= expected.keys()  # of the unfrozen model, the file keeps a selection
    assert frozen == (len(gradients) == 2)
    for key, gradient in expected.items():
        assert_close(gradients[key], gradient, 1e-4)


@pytest.mark.parametrize("name", FORWARD_CASES)
def test_sequences_and_logits(golden, build_golden_model, name):
    cases, tensors = golden("train_forward")
    case = cases["forward_cases"][name]
    model = build_golden_model(image_size=case["image_size"])
    model.prompt_list = [case["prompt"]] if case["prompt"] else []
    model.max_txt_len, model.end_sym = case["max_txt_len"], case["end_sym"]
    batch = model.prepare({"text_input": case["text_input"]})["tokens"]
    image_embeds, _ = model.encode_img(tensors[f"{name}.image"])
    embeds = model.embed(batch, image_embeds)
    assert_close(image_embeds, tensors[f"{name}.img_embeds"], 2e-4)
    assert_close(embeds, tensors[f"{name}.inputs_embeds"], 2e-4)
    assert torch.equal(batch.attention_mask, tensors[f"{name}.attention_mask"])
    assert torch.equal(batch.labels, tensors[f"{name}.targets"])
    logits = model.llama_model(inputs_embeds=embeds).logits
    key = f"{name}.logits" if f"{name}.logits" in tensors else f"{name}.logits_last_16_positions"
    expected = tensors[key]
    attended = batch.attention_mask.bool()[:, -expected.shape[1] :]
    assert_close(logits[:, -expected.shape[1] :][attended], expected[attended], 1e-3)


def test_prompt_wrapping(golden, build_golden_model):
    cases, tensors = golden("train_forward")
    wraps, wrapped = cases["prompt_wrap_cases"], load_file(GOLDEN / "prompt_wrap.safetensors")
    model = build_golden_model()
    for i, case in enumerate(wraps):
        case["prompt"] = case["prompt"] or prompt.IMAGE_SLOT  # no prompt: the image alone
        ids = prompt.encode_with_images(model.tokenizer, case["prompt"], 8)
        batch = prompt.generation_batch(model.tokenizer, [case["prompt"]] * 2, model.text_settings)
        embeds = model.embed(batch, wrapped["img_embeds"])
        assert len(ids) - 1 == case["length"]  # ours starts with <s>
        assert_close(embeds[:, 1:], wrapped[f"wrap{i}.embeds"], 1e-6)
        assert torch.equal(batch.attention_mask[:, 1:], wrapped[f"wrap{i}.atts"])


def test_prompt_files(golden, tmp_path):
    cases, _ = golden("train_forward")
    file_case = cases["prompt_file_case"]
    path = tmp_path / "prompts.txt"
    path.write_text(file_case["file_text"], encoding="utf-8")
    assert read_prompts(str(path), file_case["template"]) == file_case["prompt_list"]
    alignment = read_prompts(str(GOLDEN.parents[1] / "prompts/alignment.txt"), "###Human: {} ###Assistant: ")
    assert alignment == cases["alignment_prompts_after_template"]


def test_tokenizer_cases(golden_llm_folder):
    from minigpt4.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(golden_llm_folder))
    for case in json.loads((GOLDEN / "tokenizer_cases.json").read_text(encoding="utf-8")):
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert [tokenizer.bos_token_id, *tokenizer.encode(case["text"])] == case["ids_with_bos"]


def test_prompt_is_drawn_uniformly(build_golden_model):
    model = build_golden_model().train()
    model.prompt_list = [f"{i} {prompt.IMAGE_SLOT}" for i in range(4)]
    random.seed(0)
    drawn = [model.prepare({"text_input": ["a"]})["drawn_prompt"] for _ in range(400)]
    assert sorted(set(drawn)) == model.prompt_list
    assert min(drawn.count(text) for text in model.prompt_list) > 60
    first = model.eval().prepare({"text_input": ["a"]})
    assert first["drawn_prompt"] == model.prompt_list[0]


class FakeLLM(torch.nn.Module):
    """A stand-in for a language model of width 4096, without its 7B parameters."""

    def get_input_embeddings(self):
        return torch.nn.Embedding(1, 4096)


@pytest.fixture(scope="module")
def full_size_keys():
    return json.loads((GOLDEN / "full_size_keys.json").read_text())


def full_size(freeze_vit=True, freeze_qformer=True, llama_model=None):
    with torch.device("meta"):
        return MiniGPT4(
            create_vit("eva_clip_g", 224),
            QFormer(1408),
            llama_model or FakeLLM(),
            tokenizer=None,
            freeze_vit=freeze_vit,
            freeze_qformer=freeze_qformer,
        )


def test_full_size_names_shapes_and_types(full_size_keys):
    model = full_size()
    cast_matrices(model.visual_encoder, torch.float16)
    own = {name: (list(p.shape), str(p.dtype)) for name, p in model.state_dict().items()}
    entries = [e for e in full_size_keys["state_dict"] if e["kind"] == "parameter"]
    assert own == {e["key"]: (e["shape"], f"torch.{e['dtype']}") for e in entries}
    assert sum(dtype == "torch.float16" for _, dtype in own.values()) == 275


def test_trainable_parameters_are_in_the_same_order(full_size_keys):
    """A checkpoint of the first release stores the optimizer's state by position."""
    own = [name for name, p in full_size(False, False).named_parameters() if p.requires_grad]
    entries = [e["key"] for e in full_size_keys["state_dict"] if e["kind"] == "parameter"]
    assert sorted(own) == sorted(entries)
    for part in ("visual_encoder", "Qformer"):
        assert [n for n in own if n.startswith(part)] == [n for n in entries if n.startswith(part)]


def test_published_encoder_with_a_block_and_a_head_too_many():
    """`eva_vit_g.pth` holds 40 blocks, a final norm and a head; 39 blocks are used."""
    vit, longer = create_vit(VIT, 28), create_vit(VIT | {"depth": 4}, 28)
    state = longer.state_dict() | {"norm.weight": torch.ones(32), "head.weight": torch.ones(5, 32)}
    kept = checkpoint_filter_fn(state, vit)
    assert kept.keys() == vit.state_dict().keys()
    vit.load_state_dict(kept)


def test_ln_vision_computes_in_float32():
    """In float16, the inputs' differences would be lost beside their mean, and their squares would overflow."""
    norm = LayerNorm(64)
    x = (300 + torch.randn(2, 64)).half()
    output = norm(x)
    assert output.dtype == torch.float16
    torch.testing.assert_close(output.float(), torch.nn.functional.layer_norm(x.float(), (64,)), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", torch.bfloat16), ("fp32", torch.float32)])
def test_vit_precision(golden_llm_folder, precision, dtype):
    """`fp16` is the run's 16-bit type, for the encoder's matrices."""
    cfg = {"image_size": 28, "vit_model": VIT, "qformer": QFORMER, "vit_weights": None, "q_former_model": None}
    cfg |= {"llama_model": str(golden_llm_folder), "vit_precision": precision}
    model = MiniGPT4.from_config(cfg, dtype=torch.bfloat16)
    assert model.visual_encoder.blocks[0].mlp.fc1.weight.dtype == dtype
    assert model.visual_encoder.blocks[0].norm1.weight.dtype == torch.float32
    assert model.llama_proj.weight.dtype == torch.float32
    assert model.llama_model.dtype == torch.bfloat16
    loss = model({"image": torch.randn(2, 3, 28, 28), "text_input": ["a cat", "two dogs"]})["loss"]
    loss.backward()
    assert model.llama_proj.weight.grad.isfinite().all()


@pytest.mark.parametrize("index", range(4))
def test_full_size_trainable_parameters(full_size_keys, index):
    expected = full_size_keys["combinations"][index]
    model = full_size(expected["freeze_vit"], expected["freeze_qformer"]).train()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trainable.values()) == expected["trainable_parameters"]
    bits = {e["key"]: e["trainable"][index] == "1" for e in full_size_keys["state_dict"] if e["kind"] == "parameter"}
    assert set(trainable) == {name for name, bit in bits.items() if bit}
    modes = {name: model.get_submodule(name).training for name in expected["after_train_call_in_train_mode"]}
    assert modes == expected["after_train_call_in_train_mode"]


def test_a_7b_trains_3149824_parameters():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        llm = LlamaForCausalLM(LlamaConfig())
    assert llm.config.hidden_size == 4096
    model = full_size(llama_model=llm)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3_149_824


def test_dropout_acts_in_an_unfrozen_qformer_only():
    image = torch.randn(2, 3, 28, 28)
    for frozen in (True, False):
        qformer = QFormer(32, **(QFORMER | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}))
        model = MiniGPT4(create_vit(VIT, 28), qformer, FakeLLM(), None, 8, freeze_qformer=frozen).train()
        first, second = model.encode_img(image)[0], model.encode_img(image)[0]
        assert torch.equal(first, second) is frozen
