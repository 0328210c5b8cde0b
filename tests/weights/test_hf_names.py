"""BLIP-2 from Hugging Face folders: our names are complete, and the numbers are those of transformers' own models."""

import json

import pytest
import torch
from helpers import QFORMER
from safetensors.torch import save_file
from transformers import Blip2Config, Blip2ForConditionalGeneration

from minigpt4.models import MiniGPT4
from minigpt4.weights import checkpoint, hf_names
from minigpt4.weights.checkpoint import CheckpointError

VIT = {"patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 4.0}


@pytest.fixture(scope="module")
def blip2():
    """transformers' BLIP-2 in small, with a T5, its weights random."""
    t5 = {"d_model": 24, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 64, "model_type": "t5"}
    vision = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    qformer = {name: value for name, value in QFORMER.items() if not name.endswith("prob")}
    config = Blip2Config(
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        qformer_config={**qformer, "encoder_hidden_size": 32},
        text_config=t5,
        num_query_tokens=8,
    )
    torch.manual_seed(0)
    model = Blip2ForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.2)
        if name.endswith("qkv.bias"):
            parameter.data.view(3, -1)[1] = 0  # BLIP-2's keys have no bias
    return model


@pytest.fixture(scope="module")
def folder(blip2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("blip2")
    blip2.save_pretrained(folder, max_shard_size="40KB")
    return folder


def build(golden_llm_folder, **cfg):
    keys = {"image_size": 28, "vit_model": VIT, "qformer": QFORMER, "num_query_token": 8}
    return MiniGPT4.from_config({**keys, "llama_model": str(golden_llm_folder), **cfg})


def test_a_folder_gives_what_transformers_computes(blip2, folder, golden_llm_folder, caplog):
    caplog.set_level("INFO")
    model = build(golden_llm_folder, vit_weights=str(folder), q_former_model=str(folder))
    image = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        hidden = blip2.vision_model(image).last_hidden_state
        queries = blip2.query_tokens.expand(2, -1, -1)
        expected = blip2.qformer(query_embeds=queries, encoder_hidden_states=hidden).last_hidden_state
        tokens = model.ln_vision(model.visual_encoder(image))
        actual = model.Qformer(model.query_tokens.expand(2, -1, -1), tokens)
    torch.testing.assert_close(tokens, hidden, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_our_names_are_the_published_ones(folder):
    """The same names, from a folder, as those of the published files."""
    from minigpt4.benchmarks import published

    state = checkpoint.read_weights(folder, ("vision_model.", "qformer.", "query_tokens"))
    sizes = published.SIZES["7b"] | {"vit_blocks": 2, "qformer_layers": 4}
    surplus = ("norm.", "head.", "t5_proj.", "Qformer.bert.embeddings.position_ids")
    tables = published.eva_vit(sizes), published.blip2(sizes)
    for ours, table in zip((hf_names.vision_from_hf(state), hf_names.qformer_from_hf(state)), tables, strict=True):
        assert ours.keys() == {name for name in table if not name.startswith(surplus)}


def test_only_shards_with_wanted_tensors_are_needed(folder, golden_llm_folder, tmp_path):
    """A BLIP-2 with a T5-XXL is 48 GB; its language model need not be there."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    vision = {file for name, file in index.items() if name.startswith("vision_model.")}
    for file in ("model.safetensors.index.json", "config.json", *vision):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    assert vision < set(index.values())
    build(golden_llm_folder, vit_weights=str(tmp_path), q_former_model=None)
    with pytest.raises(CheckpointError, match=r"lacks model-0.*a shard that its index lists"):
        build(golden_llm_folder, vit_weights=str(tmp_path), q_former_model=str(tmp_path))


def test_a_single_file_in_hf_names(folder, golden_llm_folder, tmp_path):
    state = checkpoint.read_weights(folder)
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "blip2.safetensors")
    path = str(tmp_path / "blip2.safetensors")
    model = build(golden_llm_folder, vit_weights=path, q_former_model=path)
    assert torch.equal(model.query_tokens, state["query_tokens"])


def test_instructblip_gives_its_encoder(golden_llm_folder, tmp_path, blip2):
    """Its Q-Former has a text branch, which is left out."""
    from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

    config = blip2.config.to_dict()
    config["qformer_config"] |= {"vocab_size": 20}
    parts = {name: config[name] for name in ("vision_config", "qformer_config", "text_config")}
    model = InstructBlipForConditionalGeneration(InstructBlipConfig(**parts, num_query_tokens=8))
    model.save_pretrained(tmp_path)
    ours = build(golden_llm_folder, vit_weights=str(tmp_path), q_former_model=str(tmp_path))
    theirs = model.vision_model.encoder.layers[1].mlp.fc2.weight
    assert torch.equal(ours.visual_encoder.blocks[1].mlp.fc2.weight, theirs)
    assert torch.equal(ours.ln_vision.weight, model.vision_model.post_layernorm.weight)


def test_a_bias_on_the_keys_is_refused(folder):
    state = checkpoint.read_weights(folder, ("vision_model.",))
    name = "vision_model.encoder.layers.1.self_attn.qkv.bias"
    state[name] = torch.ones_like(state[name])
    with pytest.raises(CheckpointError, match="blocks.1.attn.qkv.bias has a part for the keys that is not zero"):
        hf_names.vision_from_hf(state)


def test_a_folder_without_weights(golden_llm_folder, tmp_path):
    with pytest.raises(CheckpointError, match="holds no weights"):
        build(golden_llm_folder, vit_weights=str(tmp_path), q_former_model=None)
