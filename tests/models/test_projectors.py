"""The projector as a choice: what computes it, and which checkpoints go with it."""

import pytest
import torch
from lora_models import SAMPLES, save
from torch import nn

from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.models.projectors import MLP
from minigpt4.weights.checkpoint import CheckpointError


def test_the_default_is_the_papers(build_golden_model, tmp_path):
    """Its names and its first numbers; a checkpoint does not name it."""
    model = build_golden_model()
    assert type(model.llama_proj) is nn.Linear and "projector" not in model.fingerprint
    widths = model.llama_proj.in_features, model.llama_proj.out_features
    torch.manual_seed(5)
    drawn = registry.get("projector", "linear")(*widths)
    torch.manual_seed(5)
    assert torch.equal(drawn.weight, nn.Linear(*widths).weight)


def test_two_layers(build_golden_model, tmp_path):
    model = build_golden_model(projector="mlp")
    first, second = model.llama_proj[0], model.llama_proj[2]
    features = torch.randn(2, 8, first.in_features)
    expected = nn.functional.gelu(features @ first.weight.t() + first.bias) @ second.weight.t() + second.bias
    torch.testing.assert_close(model.project(features), expected)
    model(SAMPLES)["loss"].backward()
    assert all(parameter.grad.any() for parameter in model.llama_proj.parameters())
    again = build_golden_model(projector="mlp", ckpt=save(model, tmp_path / "a.pth"))
    assert torch.equal(again.project(features), model.project(features))
    assert again.fingerprint["projector"] == "mlp"


def test_another_size_is_refused(build_golden_model, tmp_path):
    model = build_golden_model(projector="mlp")
    path = save(model, tmp_path / "a.pth", **{"llama_proj.2.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r"llama_proj\.2\.weight has shape \(2, 2\)"):
        build_golden_model(projector="mlp", ckpt=path)


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (lambda self, x: torch.cat([x, x], dim=-1), r"to \(1, 8, 48\); .* needs \(1, 8, 40\)"),
        (lambda self, x: (x,), "to tuple; "),
    ],
)
def test_a_projector_of_another_shape(build_golden_model, monkeypatch, forward, words):
    monkeypatch.setattr(MLP, "forward", forward)
    with pytest.raises(ConfigError, match=rf"model\.projector=mlp maps .* {words}"):
        build_golden_model(projector="mlp")


def test_an_unknown_name(build_golden_model):
    with pytest.raises(ConfigError, match=r"model\.projector=mpl is not registered\. Did you mean 'mlp'"):
        build_golden_model(projector="mpl")
