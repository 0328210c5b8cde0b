"""bitsandbytes' layers as training steps run them: a product turns their weights, 8 or 4 bit, back into 16 first.

It is one op, which torch.compile and CUDA graphs take as it is, and keeps nothing for the backward pass but the weights
as they lie. In 4 bit the numbers are those of bitsandbytes' own layers. In 8 bit these round the inputs too (LLM.int8),
which saves time where there are few; here only the weights are rounded, so that both directions are of one matrix.

M tokens, K inputs, N outputs.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from minigpt4.models.fused import FirstOfFused, groups, join

# In 4 bit: weights that share a scale, and how their values lie.
BLOCK, QUANT_TYPE = 64, "nf4"


def convert(module: nn.Module) -> int:
    """Turn bitsandbytes' frozen layers into such; returns how many. Groups of `fused.py` get a joint product.

    Layers that bitsandbytes quantised in another way (fp4, scales that are quantised themselves) stay as they are.
    """
    for layers in groups(module):
        parts = [_weights(layer) for layer in layers]
        if None not in parts and len({part.dtype for part, _ in parts}) == 1:
            weight, scale = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            for layer, own in zip(layers, weight.split([len(part) for part, _ in parts]), strict=True):
                _become(layer, nn.Linear, own)
            join(layers, LowBitFirstOfFused, weight)
            layers[0].joint_scale = scale
    for layer in module.modules():
        if (part := _weights(layer)) is not None:
            weight, scale = part
            _become(layer, LowBitLinear, weight)
            layer.scale = scale
    return sum(isinstance(layer, LowBitLinear | LowBitFirstOfFused) for layer in module.modules())


class LowBitLinear(nn.Linear):
    """A frozen layer whose weights lie in low bits, with their `scale`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = product(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias


class LowBitFirstOfFused(FirstOfFused):
    """The joint product of a group of layers in low bits."""

    def joint_product(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.joint_weight, self.joint_scale)


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
    """x [...,K] times a weight [N,K]: [...,N]; transposed, as gradients go: x [...,N] to [...,K].

    weight: [N,K] int8, with a scale [N] for its rows; or N·K/2 bytes of nf4, with a scale for each `BLOCK` of numbers,
    both as bitsandbytes has them. Scales are float32. The weight is x's type when it is multiplied by.
    """
    shape = sizes(x, weight, transposed)
    if weight.dtype == torch.int8:
        decoded = torch.empty(shape, dtype=x.dtype, device=x.device)
        torch.mul(weight, scale.unsqueeze(1), out=decoded)
    else:
        decoded = torch.ops.bitsandbytes.dequantize_4bit(weight, scale, BLOCK, QUANT_TYPE, shape, x.dtype)
    return x @ decoded if transposed else F.linear(x, decoded)


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


def _weights(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What `multiply` takes of a frozen layer of bitsandbytes; None for any other."""
    if not type(layer).__module__.startswith("bitsandbytes") or layer.weight.requires_grad:
        return None
    kind, weight = type(layer).__name__, layer.weight
    if kind == "Linear8bitLt":
        # bitsandbytes moves them at the first call.
        of = layer.state if layer.state.CB is not None else weight
        return None if of.CB is None else (of.CB, of.SCB.float() / 127)
    state = getattr(weight, "quant_state", None)
    if kind != "Linear4bit" or state is None or weight.dtype != torch.uint8 or weight.numel() * 2 % BLOCK:
        return None
    usual = not state.nested and state.quant_type == QUANT_TYPE and state.blocksize == BLOCK
    return (weight.data, state.absmax.float()) if usual else None


def _become(layer: nn.Linear, kind: type[nn.Linear], weight: torch.Tensor) -> None:
    """Make it a layer of another `kind`, with a plain tensor for its weight and nothing left of bitsandbytes."""
    quantized = getattr(layer.weight, "quant_state", None)
    layer.__class__ = kind
    for name in ("state", "forward"):  # of 8 bit, and of `bnb_8bit.py`
        vars(layer).pop(name, None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if quantized is not None:  # what a count of parameters looks at
        layer.weight.quant_state = SimpleNamespace(shape=quantized.shape)
