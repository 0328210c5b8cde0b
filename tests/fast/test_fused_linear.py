"""Fused projections give each layer its own part of the product, whatever the order of the calls."""

from itertools import permutations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt4.fast.fused_linear import FusedSlice, fuse_projections, fused_layers
from minigpt4.fast.self_check import TrainingCheck
from minigpt4.quantization.int8 import quantize_linear

NAMES = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """Three projections of different widths."""

    def __init__(self, low_bit: bool = False):
        super().__init__()
        torch.manual_seed(0)
        for name, width in zip(NAMES, (12, 4, 8), strict=True):
            layer = nn.Linear(16, width, bias=False).requires_grad_(False)
            setattr(self, name, quantize_linear(layer, torch.device("cpu")) if low_bit else layer)


@pytest.mark.parametrize("low_bit", [False, True])
@pytest.mark.parametrize("order", permutations(NAMES), ids="-".join)
def test_every_order_of_calls(order, low_bit):
    """A transformers release may call v before k."""
    plain, fused = Attention(low_bit), Attention(low_bit)
    assert fuse_projections(fused) == 1
    for x in torch.randn(2, 3, 16):
        for name in order:
            torch.testing.assert_close(getattr(fused, name)(x), getattr(plain, name)(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("order", permutations(NAMES), ids="-".join)
def test_every_order_of_calls_compiled(order):
    plain, fused = Attention(), Attention()
    fuse_projections(fused)

    def call(attention, x):
        return [getattr(attention, name)(x) for name in order]

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for x in torch.randn(2, 3, 16):
        for ours, expected in zip(compiled(fused, x), call(plain, x), strict=True):
            torch.testing.assert_close(ours, expected)
    torch._dynamo.reset()


def test_calls_that_are_left_out_leave_nothing_for_the_next_input():
    """A layer that was asked for another input, or twice, or whose neighbours were not called."""
    plain, fused = Attention(), Attention()
    fuse_projections(fused)
    first, second = torch.randn(2, 3, 16)
    for name, x in (("k_proj", first), ("k_proj", second), ("k_proj", second), ("q_proj", first), ("v_proj", second)):
        torch.testing.assert_close(getattr(fused, name)(x), getattr(plain, name)(x))


def test_an_equal_input_elsewhere_in_memory_is_another_input():
    plain, fused = Attention(), Attention()
    fuse_projections(fused)
    x = torch.randn(3, 16)
    fused.q_proj(x)
    x_later = x.clone().mul_(2)
    torch.testing.assert_close(fused.v_proj(x_later), plain.v_proj(x_later))


def test_nothing_outlives_the_calls():
    fused = Attention()
    fuse_projections(fused)
    x = torch.randn(3, 16)
    for name in NAMES:
        getattr(fused, name)(x)
    (layer,) = fused_layers(fused)
    assert layer._computed == (None, {})


def test_names_and_memory_stay():
    plain, fused = Attention(), Attention()
    fuse_projections(fused)
    assert list(fused.state_dict()) == list(plain.state_dict())
    for name, weight in fused.state_dict().items():
        assert torch.equal(weight, plain.state_dict()[name])
    (layer,) = fused_layers(fused)
    storages = {getattr(fused, name).weight.untyped_storage().data_ptr() for name in NAMES}
    assert storages == {layer.joint.weight.untyped_storage().data_ptr()}
    assert not any(parameter.requires_grad for parameter in fused.parameters())


def test_a_gradient_of_the_input():
    plain, fused = Attention(), Attention()
    fuse_projections(fused)
    gradients = []
    for attention in (plain, fused):
        x = torch.linspace(-1, 1, 48).view(3, 16).requires_grad_()
        sum(getattr(attention, name)(x).square().sum() for name in reversed(NAMES)).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "change",
    [
        lambda attention: attention.k_proj.requires_grad_(True),
        lambda attention: setattr(attention, "k_proj", nn.Linear(16, 4).requires_grad_(False)),
        lambda attention: setattr(attention, "k_proj", nn.Identity()),
        lambda attention: setattr(attention, "k_proj", quantize_linear(attention.k_proj, torch.device("cpu"))),
        lambda attention: delattr(attention, "v_proj"),
    ],
    ids=["trains", "bias", "another kind", "mixed", "missing"],
)
def test_groups_that_cannot_be_fused_stay(change):
    attention = Attention()
    change(attention)
    assert fuse_projections(attention) == 0
    assert not any(isinstance(part, FusedSlice) for part in attention.modules())


def test_offloaded_layers_stay(tmp_path):
    """accelerate fetches the weights of a layer that is offloaded when that very layer is called."""
    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llm")
    on_cpu = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.2", "model.norm", "lm_head")
    places = dict.fromkeys(on_cpu, "cpu") | {"model.layers.1": "disk"}
    offloaded = {"device_map": places, "offload_folder": tmp_path / "offload", "dtype": torch.float32}
    llm = LlamaForCausalLM.from_pretrained(tmp_path / "llm", **offloaded).requires_grad_(False)
    ids = torch.tensor([[1, 5, 9, 3]])
    expected = llm(ids).logits
    assert fuse_projections(llm) == 4  # both groups of the first and the last layer
    torch.testing.assert_close(llm(ids).logits, expected)
    assert TrainingCheck(llm).passes("Fused projections", fuse_projections)
