"""Encoder, Q-Former and loss against those of transformers, with the same weights."""

import re

import torch
from helpers import QFORMER
from transformers import Blip2QFormerConfig, Blip2QFormerModel, Blip2VisionConfig, Blip2VisionModel, LlamaForCausalLM

from minigpt4.models.eva_vit import create_vit
from minigpt4.models.qformer import QFormer

VIT = {"patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 4.0}


def randomize(module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


def test_vision_encoder():
    torch.manual_seed(0)
    vit = randomize(create_vit(VIT, 42))
    oracle = Blip2VisionModel(
        Blip2VisionConfig(
            hidden_size=48,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=42,
            patch_size=14,
        )
    ).eval()
    state = {}
    for name, value in vit.state_dict().items():
        name = re.sub(r"^blocks\.", "encoder.layers.", name)
        name = name.replace(".attn.proj.", ".self_attn.projection.").replace(".attn.qkv.", ".self_attn.qkv.")
        name = re.sub(r"\.norm(\d)\.", r".layer_norm\1.", name)
        name = name.replace("cls_token", "embeddings.class_embedding").replace(
            "pos_embed", "embeddings.position_embedding"
        )
        state[name.replace("patch_embed.proj.", "embeddings.patch_embedding.")] = value
    for i in range(2):
        q, v = (state.pop(f"encoder.layers.{i}.attn.{x}_bias") for x in "qv")
        state[f"encoder.layers.{i}.self_attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    missing, unexpected = oracle.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["post_layernorm.weight", "post_layernorm.bias"], [])
    image = torch.randn(2, 3, 42, 42)
    hidden = oracle(image, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(vit(image), hidden, atol=1e-4, rtol=1e-5)


def test_qformer():
    torch.manual_seed(0)
    ours = randomize(QFormer(32, **QFORMER))
    oracle = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=24,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=48,
            encoder_hidden_size=32,
            hidden_act="gelu",
        )
    ).eval()
    state = {}
    for name, value in ours.bert.state_dict().items():
        name = name.replace("attention.self.", "attention.attention.")
        state[name.replace("embeddings.LayerNorm", "layernorm")] = value
    assert oracle.load_state_dict(state, strict=False).unexpected_keys == []
    queries, image = torch.randn(2, 5, 24), torch.randn(2, 7, 32)
    expected = oracle(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
    torch.testing.assert_close(ours(queries, image), expected, atol=1e-5, rtol=1e-5)


def test_loss_equals_llama_over_all_rows(build_golden_model, golden, golden_llm_folder):
    """Ours is over tokens with labels, without a mask; LlamaForCausalLM's is over padded sequences with a mask."""
    cases, tensors = golden("train_forward")
    case = cases["forward_cases"]["stage2"]
    model = build_golden_model(max_txt_len=160, end_sym="###")
    model.prompt_list = [case["prompt"]]
    loss = model({"image": tensors["stage2.image"], "text_input": case["text_input"]})["loss"]
    batch = model.prepare({"text_input": case["text_input"]})["tokens"]
    llama = LlamaForCausalLM.from_pretrained(golden_llm_folder)
    embeds = model.embed(batch, model.encode_img(tensors["stage2.image"])[0])
    oracle = llama(inputs_embeds=embeds, attention_mask=batch.attention_mask, labels=batch.labels).loss
    torch.testing.assert_close(loss, oracle, atol=2e-6, rtol=0)
    first, second = (torch.autograd.grad(x, model.llama_proj.weight, retain_graph=True)[0] for x in (loss, oracle))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-5)
