"""Weights in 8 bit, products in 16: half the memory to read, which is what decoding one answer waits for.

Each row of a weight matrix has one scale, by its largest entry (torchao's int8 weight-only scheme). Unlike with
bitsandbytes' 8 bit (LLM.int8), activations are never rounded and no outliers are set apart. Where a decoding step
is compiled, the product of a single row turns the weights back while it reads them (`decoding_kernels.py`).
K inputs, N outputs.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Int8Linear(nn.Module):
    """A frozen linear layer with weights [N,K] int8 and a scale [N] for the rows."""

    def __init__(self, linear: nn.Linear, device: torch.device, dtype: torch.dtype | None = None):
        """dtype: computing type; None: that of the layer."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach().to(device).to(dtype or linear.weight.dtype)
        # Rounded to the computing type before the weights are divided by it: that rounding costs no accuracy.
        scale = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(weight.dtype).tiny)
        self.register_buffer("scale", scale)
        steps = (weight.float() / scale.float().unsqueeze(1)).round_().clamp_(-127, 127)
        self.register_buffer("weight", steps.to(torch.int8))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(device, weight.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return x if self.bias is None else x + self.bias


def quantize(llm: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """Bring a language model to `device` with each linear layer in 8 bit, one after another; returns it.

    The output layer is among them, unless it shares its weights with the input embeddings. All that has parameters
    computes in `dtype`; None: in the type that they have.
    """
    shared = llm.get_input_embeddings().weight
    for parent in list(llm.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.weight is not shared:
                setattr(parent, name, Int8Linear(child, device, dtype))
    for parameter in llm.parameters():
        parameter.data = parameter.data.to(device).to(dtype or parameter.dtype)
    return llm.to(device)
