"""8-bit weights without bitsandbytes: rounded here, one layer after another, on any kind of device.

Each row of a weight matrix has one scale, by its largest entry, as with bitsandbytes' 8 bit and torchao's int8
weight-only scheme. N outputs.
"""

import torch
from torch import nn

from minigpt4.quantization.bitsandbytes import LowBitLinear


def quantize_linear(layer: nn.Linear, device: torch.device, dtype: torch.dtype | None = None) -> LowBitLinear:
    """A linear layer in 8 bit on `device`. dtype: type of its bias; None: as it is."""
    weight = layer.weight.detach().to(device).float()
    scale = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)  # [N]
    rounded = (weight / scale.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8)
    made = LowBitLinear.replacing(layer, rounded, scale)
    if layer.bias is not None:
        made.bias = nn.Parameter(layer.bias.detach().to(device, dtype or layer.bias.dtype), requires_grad=False)
    return made


def quantize_model(llm: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> nn.Module:
    """Bring a language model to `device` with each linear layer in 8 bit, one after another; returns it.

    The output layer is among them, unless it shares its weights with the input embeddings. Parameters that are not
    quantised are cast to `dtype`; None: they keep their type.
    """
    shared = llm.get_input_embeddings().weight
    for parent in list(llm.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear and child.weight is not shared:
                setattr(parent, name, quantize_linear(child, device, dtype))
    for parameter in llm.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(device).to(dtype or parameter.dtype)
    return llm.to(device)
