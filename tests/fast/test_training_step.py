"""Which parts of a model a fast step computes itself. test_training_step_gpu.py has the GPU's part."""

import pytest
import torch
from helpers import loss_and_gradient, uncompiled
from torch import nn

from minigpt4.common.errors import ConfigError
from minigpt4.models import MiniGPT4
from minigpt4.models.mini_gpt4 import PlainStep

SAMPLES = {"image": torch.linspace(-1, 1, 2 * 3 * 28 * 28).view(2, 3, 28, 28), "text_input": ["a dog", "two cats"]}


class OwnFeatures(MiniGPT4):
    """A plug-in with another signature than the base class's, too."""

    def query_outputs(self, image):
        return super().query_outputs(image) * 2


class OwnEncoding(MiniGPT4):
    """A plug-in that does not ask the step for the vision side."""

    def encode_img(self, image):
        image_embeds = self.project(self.query_outputs(image)) * 2
        return image_embeds, torch.ones(image_embeds.shape[:2], dtype=torch.long)


class OwnLogits(MiniGPT4):
    def predict(self, embeds, tokens):
        return super().predict(embeds, tokens) * 0.5


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", [MiniGPT4, OwnFeatures, OwnEncoding, OwnLogits])
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
    assert bool(model.step.fused_vit) == (compiled and kind not in (OwnFeatures, OwnEncoding))
    assert bool(model.step.fused_llama) == (compiled and kind is not OwnLogits)


@pytest.mark.parametrize("packed", [False, True])
def test_a_plug_ins_own_weights_get_their_gradient(build_golden_model, packed):
    """Whatever their name is."""

    class Scaled(MiniGPT4):
        def predict(self, embeds, tokens):
            return super().predict(embeds, tokens) * self.llama_proj.scale

    model = build_golden_model()
    model.__class__ = Scaled
    model.llama_proj.scale = nn.Parameter(torch.tensor(2.0))
    model.accelerate(packed=packed, compiled=False)
    model(SAMPLES)["loss"].backward()
    assert model.llama_proj.scale.grad.abs() > 1e-3


def test_a_plug_ins_own_step_stays(build_golden_model):
    class OwnStep(PlainStep):
        pass

    model = build_golden_model()
    model.step = OwnStep()
    model.accelerate(packed=True, compiled=True)
    assert type(model.step) is OwnStep
    with pytest.raises(ConfigError, match="OwnStep"):
        model.accelerate(packed=True, compiled=True, fp8=True)


def test_the_blocks_of_a_plug_ins_own_encoding_are_compiled(build_golden_model):
    model = build_golden_model()
    model.__class__ = OwnEncoding
    model.accelerate(packed=True, compiled=True)
    assert all(block._compiled_call_impl for block in model.visual_encoder.blocks)


def test_an_encoder_of_another_kind(build_golden_model):
    """A plug-in's encoder has blocks and an image size, and nothing else that timm's has."""

    class Encoder(nn.Module):
        image_size, num_features = 28, 16

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(3, 3)])

    model = build_golden_model()
    model.visual_encoder = Encoder().requires_grad_(False)
    model.accelerate(packed=True, compiled=True)
    assert model.step.fused_vit is None and model.visual_encoder.blocks[0]._compiled_call_impl


@pytest.mark.parametrize("packed", [False, True])
def test_batches_of_the_other_kind(build_golden_model, packed):
    """A batch may have been made before the step was installed, or by a plug-in's own `prepare`."""
    model = build_golden_model()
    model.accelerate(packed=not packed, compiled=False)
    batch = model.prepare(SAMPLES)
    expected, gradient = loss_and_gradient(model, batch)
    model.accelerate(packed=packed, compiled=False)
    output, other_gradient = loss_and_gradient(model, batch)
    torch.testing.assert_close(output["loss"], expected["loss"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(other_gradient, gradient, atol=1e-5, rtol=1e-4)


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
