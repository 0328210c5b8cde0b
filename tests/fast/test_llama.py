"""A fused Llama computes what transformers' does."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from minigpt4.fast.attention import allow_packing
from minigpt4.fast.fused_linear import fuse_projections
from minigpt4.fast.llama import FusedLlama, supports_fused_llama
from minigpt4.fast.packing.batch import pack
from minigpt4.models.llm import recompute_layers
from minigpt4.models.prompt import IGNORE_INDEX, IMAGE_ID

SIZES = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}


def llama(packed=True, fused=True, dtype=torch.float64, **sizes):
    """With norms that are no ones."""
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_attention_heads": 4, **sizes}))
    llm.to(dtype).requires_grad_(False)
    for name, weight in llm.named_parameters():
        weight.data.normal_(1 if "norm" in name else 0, 0.3)
    assert not packed or allow_packing(llm)
    assert not fused or fuse_projections(llm)
    return llm


def batch():
    """A micro-batch of three sequences that share two tokens."""
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 50, (n,), generator=generator).tolist() for n in (9, 3, 20)]
    sequences = [[1, 2, IMAGE_ID, IMAGE_ID, *text] for text in texts]
    labels = [[IGNORE_INDEX] * 4 + ids[4:] for ids in sequences]
    (micro_batch,) = pack(sequences, labels, 1024).micro_batches
    return micro_batch


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"num_key_value_heads": 2, "head_dim": 16},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ],
)
def test_equals_transformers(sizes):
    """Logits and the gradient of the embeddings, of whole layers and the last one's rows with labels."""
    llm, micro_batch = llama(**sizes), batch()
    assert supports_fused_llama(llm)
    results = []

    def transformers(embeds, micro_batch):
        return llm(inputs_embeds=embeds, **micro_batch.llm_inputs()).logits

    for predict in (FusedLlama(llm, compiled=False), transformers):
        torch.manual_seed(0)
        embeds = torch.randn(1, micro_batch.sizes.tokens, 32, dtype=torch.float64, requires_grad=True)
        logits = predict(embeds, micro_batch)
        labelled = micro_batch.targets[0] != IGNORE_INDEX
        loss = (logits[0, labelled] * torch.randn(int(labelled.sum()), 50)).sum()
        results.append((logits[0, labelled], torch.autograd.grad(loss, embeds)[0]))
    for fused, usual in zip(*results, strict=True):
        assert (fused - usual).norm() < 1e-5 * usual.norm()  # norms compute in float32


def recomputing():
    llm = llama()
    recompute_layers(llm, 1)
    return llm


def other_layer():
    llm = llama()
    llm.model.layers[1].__class__ = type("Own", (type(llm.model.layers[1]),), {})
    return llm


def training():
    """One embedding is all that a part of a gradient would be wrong for."""
    llm = llama()
    llm.get_input_embeddings().requires_grad_(True)
    return llm


def mistral():
    llm = MistralForCausalLM(MistralConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, sliding_window=None))
    fuse_projections(llm.requires_grad_(False))
    return llm


@pytest.mark.parametrize(
    "build",
    [
        recomputing,
        other_layer,
        mistral,
        lambda: llama(fused=False),
        lambda: llama(attention_bias=True),
        lambda: llama(mlp_bias=True),
        lambda: llama(hidden_act="gelu"),
        lambda: llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        lambda: copy.copy(llama()).model,
        training,
    ],
)
def test_other_models_are_not_supported(build):
    assert not supports_fused_llama(build())
