"""Adapters of the golden model, for the tests of LoRA."""

import torch

from minigpt4.weights import checkpoint

LORA = {"r": 2, "alpha": 6, "dropout": 0.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}
SAMPLES = {"image": torch.linspace(-1, 1, 3 * 3 * 28 * 28).view(3, 3, 28, 28)}
SAMPLES["text_input"] = ["a dog", "two cats on a mat, asleep", "one"]


def adapters(model) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if ".lora_" in name}


def trained(model):
    """The model with adapters as after some training, always the same: no matrix B is zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters(model).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    return model


def save(model, path, **others) -> str:
    """Save the trained tensors of a model, and others. Returns the path."""
    weights = {name: value.detach() for name, value in checkpoint.saved_parameters(model).items()}
    torch.save({"model": weights | others, "llm_fingerprint": model.fingerprint}, path)
    return str(path)
