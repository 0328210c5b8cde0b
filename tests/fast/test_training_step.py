"""Which parts of a model a fast step computes itself. test_training_step_gpu.py has the GPU's part."""

import pytest
import torch
from helpers import loss_and_gradient

from minigpt4.fast.llama import FusedLlama
from minigpt4.fast.vit import FusedViT
from minigpt4.models import MiniGPT4
from minigpt4.models.mini_gpt4 import PlainStep, summed_cross_entropy

SAMPLES = {"image": torch.linspace(-1, 1, 2 * 3 * 28 * 28).view(2, 3, 28, 28), "text_input": ["a dog", "two cats"]}


class OwnFeatures(MiniGPT4):
    """A plug-in with another signature than the base class's, too."""

    def query_outputs(self, image):
        return super().query_outputs(image) * 2


class OwnLogits(MiniGPT4):
    def predict(self, embeds, tokens):
        return super().predict(embeds, tokens) * 0.5


def uncompiled(model) -> None:
    """Let everything that was set up compute as it is: no compiler, no graphs."""
    step = model.step
    step.graphed_vision = step.loss_and_gradient = None
    step.summed_cross_entropy = summed_cross_entropy
    for part in model.modules():
        part._compiled_call_impl = None
    if step.fused_llama:
        step.fused_llama = FusedLlama(model.llama_model, compiled=False)
    if step.fused_vit:
        step.fused_vit = FusedViT(model.visual_encoder, compiled=False)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [MiniGPT4, OwnFeatures, OwnLogits])
def test_a_plug_ins_own_methods_are_called(build_golden_model, kind, compiled):
    model = build_golden_model()
    model.__class__ = kind
    expected, gradient = loss_and_gradient(model, SAMPLES)
    model.accelerate(packed=True, compiled=compiled)
    uncompiled(model)
    output, packed_gradient = loss_and_gradient(model, SAMPLES)
    assert output["num_labels"] == expected["num_labels"]
    torch.testing.assert_close(output["loss"], expected["loss"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(packed_gradient, gradient, atol=1e-5, rtol=1e-4)
    assert bool(model.step.fused_vit) == (compiled and kind is not OwnFeatures)
    assert bool(model.step.fused_llama) == (compiled and kind is not OwnLogits)


def test_a_step_is_exchanged_as_an_object(build_golden_model):
    """Nothing of the model is replaced by name, and the plain step is one assignment away."""
    model = build_golden_model()
    expected, _ = loss_and_gradient(model, SAMPLES)
    before = set(vars(model))
    model.accelerate(packed=True, compiled=False)
    assert set(vars(model)) == before and type(model.step) is not PlainStep
    model.step = PlainStep()
    output, _ = loss_and_gradient(model, SAMPLES)
    assert torch.equal(output["loss"], expected["loss"])
