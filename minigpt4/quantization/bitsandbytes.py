"""Frozen layers with weights in 8 or 4 bit: those that bitsandbytes quantised, and those of `int8.py`.

A product dequantises the weights into the type of its input and multiplies. The backward pass keeps nothing but the
quantised weights. torch.compile and CUDA graphs take the product as one operator. bitsandbytes' own layers do the same
in 4 bit, to rounding. Its 8-bit layers (LLM.int8) round the activations too, so that a token's numbers depend on the
other tokens of the batch. In compiled decoding steps kernels read a single row's weights as they are stored
(`fast/decoding/compiled_layers.py`).

K inputs, N outputs.
"""

import functools
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn

from minigpt4.common import compat
from minigpt4.kernels.dispatch import use_triton

# In 4 bit: how many weights share a scale, and the code they are stored in.
BLOCK, QUANT_TYPE = 64, "nf4"


class LowBitLinear(nn.Linear):
    """A frozen linear layer with quantised weights.

    8 bit: `weight` [N,K] int8 and `scale` [N] for its rows. 4 bit: `weight` [N*K/2,1] uint8 with two nf4 numbers in
    each, `scale` for each `BLOCK` of them, and `code` [16], the values that they stand for. Scales and code are
    float32.
    """

    @classmethod
    def replacing(
        cls, layer: nn.Linear, weight: torch.Tensor, scale: torch.Tensor, code: torch.Tensor | None = None
    ) -> "LowBitLinear":
        """A layer with the sizes and the bias of `layer`, and these weights."""
        made = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        made.weight, made.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        made.register_buffer("scale", scale, persistent=False)
        made.register_buffer("code", code, persistent=False)
        return made.train(layer.training)

    @classmethod
    def concatenate(cls, layers: list["LowBitLinear"]) -> "LowBitLinear | None":
        """One layer [N1+N2+…,K] of several without bias; None: some are in 8 bit and some in 4."""
        if len({layer.weight.dtype for layer in layers}) > 1:
            return None
        outputs = sum(layer.out_features for layer in layers)
        sizes = nn.Linear(layers[0].in_features, outputs, bias=False, device="meta")
        weight = torch.cat([layer.weight.data for layer in layers])
        return cls.replacing(sizes, weight, torch.cat([layer.scale for layer in layers]), layers[0].code)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y = _LowBitLinear.apply(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def replace_bitsandbytes_layers(module: nn.Module) -> int:
    """Exchange bitsandbytes' frozen layers for a `LowBitLinear` with their weights; returns how many were.

    Those in a form that `LowBitLinear` does not have (fp4, nested quantisation) stay bitsandbytes'.
    """
    replaced = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            weights = _bitsandbytes_weights(child)
            if weights:
                setattr(parent, name, LowBitLinear.replacing(child, *weights))
                replaced += 1
    return replaced


def keep_4bit_weights(module: nn.Module) -> None:
    """Keep the layers that stay bitsandbytes' from repacking their weights, after which gradients are wrong."""
    for part in module.modules():
        if compat.is_from_bitsandbytes(part):
            compat.keep_4bit_weights(part)


def has_bitsandbytes_layers(module: nn.Module) -> bool:
    """Whether layers of bitsandbytes' own are in a model. They can be neither compiled nor captured."""
    return any(compat.is_from_bitsandbytes(part) for part in module.modules())


class _LowBitLinear(torch.autograd.Function):
    """`low_bit_matmul` with a gradient for x."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return low_bit_matmul(x, weight, scale, False)

    @staticmethod
    def backward(ctx, gradient):
        return low_bit_matmul(gradient, *ctx.saved_tensors, True), None, None


@torch.library.custom_op("minigpt4::low_bit_product", mutates_args=())
def low_bit_matmul(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, transposed: bool) -> torch.Tensor:
    """x [...,K] times a weight as of `LowBitLinear`: [...,N]. transposed, for gradients: x [...,N] to [...,K]."""
    shape = weight_shape(x, weight, transposed)
    if weight.dtype == torch.uint8:
        decoded = compat.dequantize_4bit(weight, scale, BLOCK, QUANT_TYPE, shape, x.dtype)
    elif use_triton(x) and _kernel_runs(x.device):
        from minigpt4.kernels.int8 import dequantize_int8

        decoded = dequantize_int8(weight, scale, x.dtype)
    else:
        decoded = torch.empty(shape, dtype=x.dtype, device=x.device)
        torch.mul(weight, scale.unsqueeze(1), out=decoded)  # rounded once
    return x @ decoded if transposed else F.linear(x, decoded)


@functools.cache
def _kernel_runs(device: torch.device) -> bool:
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (8, 0)


@low_bit_matmul.register_fake
def _(x, weight, scale, transposed):
    return x.new_empty(*x.shape[:-1], weight_shape(x, weight, transposed)[1 if transposed else 0])


def weight_shape(x: torch.Tensor, weight: torch.Tensor, transposed: bool = False) -> list[int]:
    """[N,K] of a quantised weight that is multiplied by x."""
    if weight.dtype == torch.int8:
        return [*weight.shape]
    known = x.shape[-1]
    other = weight.numel() * 2 // known
    return [known, other] if transposed else [other, known]


def _bitsandbytes_weights(layer: nn.Module) -> tuple[torch.Tensor, ...] | None:
    """Weight, scale and in 4 bit the code of a layer of bitsandbytes; None for any other layer or form."""
    if not (compat.is_from_bitsandbytes(layer) and isinstance(layer, nn.Linear)):
        return None
    if type(layer).__name__ == "Linear8bitLt":
        found = compat.int8_weights(layer)
        return None if found is None else (found[0], found[1].float() / 127)
    state = getattr(layer.weight, "quant_state", None)
    if state is None or state.nested or state.quant_type != QUANT_TYPE or state.blocksize != BLOCK:
        return None
    whole_blocks = layer.in_features * layer.out_features % BLOCK == 0
    if layer.weight.dtype != torch.uint8 or not whole_blocks:
        return None
    return layer.weight.data, state.absmax.float(), state.code.float()
