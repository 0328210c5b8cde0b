"""The self-checks find a library whose layers compute something else, say so in one line, and fall back."""

import logging

import pytest
import torch
from timm.models.eva import EvaBlock
from torch import nn
from transformers.models.llama import modeling_llama

from minigpt4.fast.decoding.kv_cache import KVCache
from minigpt4.fast.decoding.loop import CachedDecoding
from minigpt4.fast.fused_linear import FusedLinear, fused_layers
from minigpt4.fast.self_check import decodes_like_the_library, first_layers

SAMPLES = {"image": torch.linspace(-1, 1, 2 * 3 * 28 * 28).view(2, 3, 28, 28), "text_input": ["a dog", "two cats"]}


def steps_of(model) -> str:
    step = model.step
    return " ".join(
        name
        for name, is_on in {"packed": step.packed, "llama": step.fused_llama, "vit": step.fused_vit}.items()
        if is_on
    )


def warnings_of(caplog) -> list[str]:
    """The self-check's own: each is one line and says that something is off."""
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and r.getMessage().endswith("off.")]


def test_nothing_is_said_where_all_agree(build_golden_model, caplog):
    model = build_golden_model()
    model.accelerate(packed=True, compiled=True)
    assert steps_of(model) == "packed llama vit"
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trained_weights_in_16_bit(load_tiny, caplog, dtype):
    """Gradients of trained weights are large. In float16 they must not overflow."""
    model = load_tiny(dtype=dtype)
    model.accelerate(packed=True, compiled=True)
    assert steps_of(model) == "packed llama vit"
    assert warnings_of(caplog) == []


class Adapted(nn.Module):
    """A linear layer with something that trains, behind dropout."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.dropout = layer, nn.Dropout(0.1)
        self.added = nn.Linear(layer.in_features, layer.out_features)

    def forward(self, x):
        return self.layer(x) + self.added(self.dropout(x))


def test_dropout_is_no_difference(build_golden_model, caplog):
    model = build_golden_model()
    for layer in model.llama_model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj)
    for part in model.llama_model.modules():
        part.training = True
    state = torch.get_rng_state()
    model.accelerate(packed=True, compiled=False)
    assert model.step.packed and warnings_of(caplog) == []
    assert all(part.training for part in model.llama_model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_dropped_attention_weights_are_not_packed(build_golden_model):
    """The packed attention drops none, so a model that trains with such dropout gets padded batches."""
    model = build_golden_model()
    model.llama_model.config.attention_dropout = 0.1
    model.llama_model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    model.accelerate(packed=True, compiled=False)
    assert not model.step.packed


def test_a_check_that_cannot_be_made_switches_off(build_golden_model, caplog):
    """Gradients cannot be compared in inference mode; the model goes on without its fast paths."""
    model = build_golden_model()
    with torch.inference_mode():
        model.accelerate(packed=True, compiled=False)
    assert steps_of(model) == "" and "packed attention" in warnings_of(caplog)[0]


def test_joint_projections_that_differ(build_golden_model, monkeypatch, caplog):
    """Nothing is fused then."""
    output = FusedLinear.output
    monkeypatch.setattr(FusedLinear, "output", lambda self, name, x: 1.1 * output(self, name, x))
    model = build_golden_model()
    model.accelerate(packed=True, compiled=True)
    assert "projections" in warnings_of(caplog)[0]
    assert not list(fused_layers(model.llama_model)) and steps_of(model) == "packed vit"


def scaled_mlp(monkeypatch):
    """A release whose MLP scales its output."""
    forward = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: 0.5 * forward(self, x))


def doubled_attention(monkeypatch):
    """A release whose layers add their attention twice."""
    forward = modeling_llama.LlamaAttention.forward

    def twice(self, *args, **kwargs):
        out, weights = forward(self, *args, **kwargs)
        return 2 * out, weights

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", twice)


@pytest.mark.parametrize("change", [scaled_mlp, doubled_attention])
def test_a_changed_llama_layer(build_golden_model, monkeypatch, caplog, change):
    """The loss stays the library's, packed and by its own layers."""
    change(monkeypatch)
    expected = build_golden_model()(SAMPLES)["loss"].item()
    model = build_golden_model()
    model.accelerate(packed=True, compiled=True)
    assert steps_of(model) == "packed vit"
    (warning,) = warnings_of(caplog)
    assert "Llama" in warning and "\n" not in warning
    for layer in model.llama_model.model.layers:  # as it is, without the compiler
        layer._compiled_call_impl = None
    model.step.graphed_vision = model.step.loss_and_gradient = None
    assert model(SAMPLES)["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_a_llama_layer_with_other_names(build_golden_model, monkeypatch, caplog):
    """A fast path that fails is off, too, and the run goes on."""
    model = build_golden_model()
    for layer in model.llama_model.model.layers:
        layer.second_norm = layer.post_attention_layernorm
    changed = modeling_llama.LlamaDecoderLayer.forward

    def forward(self, *args, **kwargs):
        self.post_attention_layernorm = self.second_norm
        try:
            return changed(self, *args, **kwargs)
        finally:
            del self.post_attention_layernorm

    for layer in model.llama_model.model.layers:
        del layer.post_attention_layernorm
    monkeypatch.setattr(modeling_llama.LlamaDecoderLayer, "forward", forward)
    model.accelerate(packed=True, compiled=True)
    assert steps_of(model) == "packed vit"
    assert "AttributeError" in warnings_of(caplog)[0]


def test_attention_that_ignores_what_is_registered(build_golden_model, monkeypatch, caplog):
    """Packed sequences would attend to each other: batches are padded then."""
    forward = modeling_llama.LlamaAttention.forward

    def ignoring(self, *args, segments=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", ignoring)
    expected = build_golden_model()(SAMPLES)["loss"].item()
    model = build_golden_model()
    model.accelerate(packed=True, compiled=False)
    assert steps_of(model) == ""
    assert "packed attention" in warnings_of(caplog)[0]
    assert model.llama_model.config._attn_implementation == "sdpa"
    assert model(SAMPLES)["loss"].item() == pytest.approx(expected, rel=1e-6)


def test_a_changed_block_of_timm(build_golden_model, monkeypatch, caplog):
    forward = EvaBlock.forward
    monkeypatch.setattr(EvaBlock, "forward", lambda self, x, *args, **kwargs: 2 * forward(self, x, *args, **kwargs))
    model = build_golden_model()
    model.accelerate(packed=True, compiled=True)
    assert steps_of(model) == "packed llama"
    assert "vision encoder" in warnings_of(caplog)[0]


def test_decoding_with_a_model_that_ignores_positions(build_golden_model, monkeypatch, caplog):
    """Where a cache cannot give the model's own logits, transformers' `generate` decodes."""
    llm = build_golden_model().llama_model
    assert decodes_like_the_library(llm, KVCache) and CachedDecoding().supports(llm)
    forward = modeling_llama.LlamaModel.forward

    def without_positions(self, *args, position_ids=None, **kwargs):
        return (
            forward(self, *args, position_ids=torch.zeros_like(position_ids), **kwargs)
            if position_ids is not None
            else forward(self, *args, **kwargs)
        )

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", without_positions)
    assert not CachedDecoding().supports(llm)
    assert "decoding loop" in warnings_of(caplog)[0]


@pytest.mark.parametrize("recomputed", [0, 3])
def test_the_first_layers_are_a_model_of_two(build_golden_model, recomputed):
    """They share all weights, and the model keeps its layers."""
    model = build_golden_model(llm_grad_checkpoint=recomputed)
    llm, ids = model.llama_model, torch.tensor([[1, 5, 9]])
    count = len(llm.model.layers)
    small = first_layers(llm)
    assert len(small.model.layers) == 2 and len(llm.model.layers) == count == llm.config.num_hidden_layers
    assert {p.data_ptr() for p in small.parameters()} <= {p.data_ptr() for p in llm.parameters()}
    layers, llm.model.layers = llm.model.layers, nn.ModuleList(llm.model.layers[:2])
    assert torch.equal(small(ids).logits, llm(ids).logits)
    llm.model.layers = layers
