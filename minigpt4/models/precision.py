"""Which weights are in 16 bit."""

import torch
from torch import nn


def cast_matrices(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast linear and convolution layers, weights and biases; norms, positions and the q and v biases stay."""
    for part in module.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            part.to(dtype)
