"""Frozen layers whose weights lie in 8 or 4 bit, as bitsandbytes quantised them, or in 8 bit `int8.py`.

A product turns the weights back into the type of what it is given, as one op that torch.compile and CUDA graphs take as
it is, and keeps nothing for the backward pass but the weights as they lie. bitsandbytes' own layers do the same in
4 bit, to rounding; in 8 bit (LLM.int8) they round the activations too, so that a token's numbers depend on which others
are read with it. Where a decoding step is compiled, kernels read a single row's weights as they lie
(`decoding_layers.py`).

K inputs, N outputs.
"""

import functools
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import nn

from minigpt4.fast.fused_linear import FirstOfFused, groups, join
from minigpt4.kernels.dispatch import use_triton

# In 4 bit: weights that share a scale, and how their values lie.
BLOCK, QUANT_TYPE = 64, "nf4"


class LowBitLinear(nn.Linear):
    """A frozen layer with weights [N,K] int8 and a scale [N] for the rows; or with [N*K/2,1] uint8, two nf4 in each, a
    scale for each `BLOCK` of these, and the `code` [16] that they stand for. Scales and code are float32.
    """

    @classmethod
    def replacing(
        cls, layer: nn.Linear, weight: torch.Tensor, scale: torch.Tensor, code: torch.Tensor | None = None
    ) -> "LowBitLinear":
        """A layer with the sizes and the bias of another."""
        made = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        made.weight, made.bias = nn.Parameter(weight, requires_grad=False), layer.bias
        made.register_buffer("scale", scale, persistent=False)
        made.register_buffer("code", code, persistent=False)
        return made.train(layer.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = product(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class LowBitFirstOfFused(FirstOfFused):
    """The joint product of a group of layers in low bits."""

    def joint_product(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.joint_weight, self.joint_scale)


def convert(module: nn.Module) -> int:
    """Put such layers in the place of bitsandbytes' frozen ones, with their weights; returns how many.

    Those that it quantised in another way (fp4, scales that are quantised themselves) stay as they are.
    """
    found = [
        (parent, name, child, _weights(child)) for parent in module.modules() for name, child in parent.named_children()
    ]
    converted = [each for each in found if each[-1]]
    for parent, name, child, weights in converted:
        setattr(parent, name, LowBitLinear.replacing(child, *weights))
    return len(converted)


def of_bitsandbytes(module: nn.Module) -> bool:
    """Whether there are layers of bitsandbytes in it, which compile and record badly."""
    return any(type(part).__module__.startswith("bitsandbytes") for part in module.modules())


def fuse(module: nn.Module) -> int:
    """Give groups of layers (`fused.py`) in low bits a joint product; returns how many groups there were."""
    fused = 0
    for layers in groups(module):
        if {type(layer) for layer in layers} == {LowBitLinear} and len({layer.weight.dtype for layer in layers}) == 1:
            weight = torch.cat([layer.weight.data for layer in layers])
            parts = weight.split([len(layer.weight) for layer in layers])
            layers[0].joint_scale = torch.cat([layer.scale for layer in layers])
            for layer, part in zip(layers, parts, strict=True):
                layer.weight.data, layer.scale = part, None
            join(layers, LowBitFirstOfFused, weight)
            fused += 1
    return fused


def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`multiply` with a gradient for x, in autocast's type where that is on."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _Product.apply(x, weight, scale)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(weight, scale)
        return multiply(x, weight, scale, False)

    @staticmethod
    def backward(ctx, gradient):
        return multiply(gradient, *ctx.saved_tensors, True), None, None


@torch.library.custom_op("minigpt4::low_bit_product", mutates_args=())
def multiply(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, transposed: bool) -> torch.Tensor:
    """x [...,K] times a weight as of `LowBitLinear`: [...,N]; transposed, as gradients go: x [...,N] to [...,K]."""
    shape = sizes(x, weight, transposed)
    if weight.dtype == torch.uint8:
        decoded = torch.ops.bitsandbytes.dequantize_4bit(weight, scale, BLOCK, QUANT_TYPE, shape, x.dtype)
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


@multiply.register_fake
def _(x, weight, scale, transposed):
    return x.new_empty(*x.shape[:-1], sizes(x, weight, transposed)[1 if transposed else 0])


def sizes(x: torch.Tensor, weight: torch.Tensor, transposed: bool = False) -> list[int]:
    """N and K of a weight that is multiplied by x."""
    if weight.dtype == torch.int8:
        return [*weight.shape]
    known = x.shape[-1]
    other = weight.numel() * 2 // known
    return [known, other] if transposed else [other, known]


def _weights(layer: nn.Module) -> tuple[torch.Tensor, ...] | None:
    """Weight, scale and in 4 bit the code of a frozen layer of bitsandbytes; None for any other."""
    kind = type(layer).__name__ if of_bitsandbytes(layer) and isinstance(layer, nn.Linear) else ""
    if kind == "Linear8bitLt":
        # bitsandbytes moves them at the first call
        of = layer.weight if layer.state.CB is None else layer.state
        return None if of.CB is None else (of.CB, of.SCB.float() / 127)
    state = getattr(layer.weight, "quant_state", None) if kind == "Linear4bit" else None
    if state is None or state.nested or state.quant_type != QUANT_TYPE or state.blocksize != BLOCK:
        return None
    whole = layer.weight.dtype == torch.uint8 and layer.in_features * layer.out_features % BLOCK == 0
    return (layer.weight.data, state.absmax.float(), state.code.float()) if whole else None
