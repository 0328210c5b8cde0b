"""How the numbers of frozen weights are stored: in 8 bit, 4 bit or fp8."""

import torch
from torch import nn


def convert_layers(llm: nn.Module, load_in: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A language model that was just loaded, its quantised layers exchanged for this project's.

    With `load_in` "8bit_weights" its linear layers are rounded here and brought to `device`. Layers that bitsandbytes
    quantised, which a folder may hold, are exchanged too, unless the model is spread over several devices: accelerate
    moves the inputs of the layers that it knows.
    """
    from minigpt4.quantization.bitsandbytes import keep_4bit_weights, replace_bitsandbytes_layers
    from minigpt4.quantization.int8 import quantize_model

    if load_in == "8bit_weights":
        llm = quantize_model(llm, device, dtype)
    if len({parameter.device for parameter in llm.parameters()}) == 1:
        replace_bitsandbytes_layers(llm)
    keep_4bit_weights(llm)
    return llm
