"""Frozen linear layers in fp8: products at twice the rate of 16 bit on a Hopper GPU, of rounded weights and inputs.

Both are rounded to e4m3, the weights once, the inputs at each step, with one scale a row by its largest entry, as in
torchao's row-wise recipe. The backward pass gives the gradient of the input by a product of the same kind, with a copy
of the weights that is rounded by columns: the GPU wants both factors to lie along the dimension that it sums over. So
two copies in 8 bit take the place of one in 16.

Gradients are in e4m3 too: each row having a scale, the third bit of mantissa is worth more than the range of e5m2. Both
directions use fast sums (`use_fast_accum`): partial sums stay in the tensor cores and are not carried over to float32
every few products. Where a scale belongs to a row, that recipe does so for all products.

M tokens, K inputs, N outputs.
"""

import importlib.util
import logging

import torch
from torch import nn

from minigpt4.common.errors import ConfigError
from minigpt4.fast.fused_linear import FirstOfFused
from minigpt4.quantization.fp8_rounding import (
    Rounded,
    quantize_rows,
    round_rows,
    round_silu_product,
    round_silu_product_gradient,
)

# Sizes that the GPU's product takes.
MULTIPLE = 16


def check(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError where `run.fp8` is not possible: another GPU or computing type, or a model that has no such."""
    off = "or set run.fp8=False."
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0):
        here = device.type
        if device.type == "cuda":
            capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
            here = f"{torch.cuda.get_device_name(device)} ({capability})"
        raise ConfigError(
            "run.fp8=True needs an NVIDIA GPU of compute capability 9.0 or newer (Hopper); this run's device is "
            f"{here}. Use such a GPU, {off}"
        )
    if dtype != torch.bfloat16:
        raise ConfigError(
            f"run.fp8=True goes with bfloat16; this run computes in {str(dtype).removeprefix('torch.')}. "
            f"Set run.amp=True and run.amp_dtype=bf16, {off}"
        )
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            f"run.fp8=True needs Triton, which comes with torch for CUDA on Linux and is not here. Install it, {off}"
        )
    if not hasattr(model, "accelerate"):
        raise ConfigError(
            f"run.fp8=True: {type(model).__name__} has no `accelerate`, which would do it. Set run.fp8=False."
        )


def convert_to_fp8(llm: nn.Module, visual_encoder: nn.Module | None = None) -> None:
    """Turn frozen linear layers in bfloat16 into such in fp8: the language model's, and a frozen encoder's.

    Those inside its layers and blocks are meant; others, and sizes that are no multiples of `MULTIPLE`, stay as they
    are. The encoder passes no gradient on from then.

    Raises ConfigError for a language model that has no such layer, as a quantised one.
    """
    layers = llm.get_decoder().layers
    _convert(layers, with_gradient=True)
    if not any(isinstance(part, Fp8) for part in layers.modules()):
        raise ConfigError(
            "run.fp8=True: the language model has no frozen linear layers in bfloat16 with sizes in multiples of "
            f"{MULTIPLE}. Set model.load_in=16bit, or run.fp8=False."
        )
    if visual_encoder is not None and not any(p.requires_grad for p in visual_encoder.parameters()):
        for part in visual_encoder.modules():
            if hasattr(part, "qkv_bias_separate"):
                part.qkv_bias_separate = True  # timm's attention calls its layer then, and does not take its weight
        _convert(visual_encoder.blocks, with_gradient=False)


def product(
    rounded: Rounded, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Rounded rows [M,K] times weight [N,K] e4m3 with scale [1,N] float32, plus bias [N]: [M,N] bfloat16."""
    rows, row_scale = rounded
    bias = None if bias is None else bias.bfloat16()
    return torch._scaled_mm(
        rows, weight.t(), row_scale, scale, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


class _Product(torch.autograd.Function):
    """`product` of x [M,K], with a gradient for it alone.

    What comes from a norm has a gradient that comes from elsewhere, and the other way round.
    """

    @staticmethod
    def forward(ctx, x, of_norm, bias, weight, scale, columns, column_scale):
        ctx.save_for_backward(columns, column_scale)
        ctx.dtype, ctx.of_norm = x.dtype, of_norm
        return product(quantize_rows(x) if of_norm else round_rows(x), weight, scale, bias)

    @staticmethod
    def backward(ctx, gradient):
        rounded = round_rows(gradient) if ctx.of_norm else quantize_rows(gradient)
        return product(rounded, *ctx.saved_tensors).to(ctx.dtype), *[None] * 6


class _SiluMlp(torch.autograd.Function):
    """down(silu(gate) * up) of x [M,K], with a gradient for it alone."""

    @staticmethod
    def forward(ctx, x, weight, scale, columns, column_scale, down, down_scale, down_columns, down_column_scale):
        gate_up = product(quantize_rows(x), weight, scale)
        ctx.save_for_backward(gate_up, columns, column_scale, down_columns, down_column_scale)
        ctx.dtype = x.dtype
        return product(round_silu_product(gate_up), down, down_scale)

    @staticmethod
    def backward(ctx, gradient):
        gate_up, columns, column_scale, down_columns, down_column_scale = ctx.saved_tensors
        gradient = product(round_rows(gradient), down_columns, down_column_scale)
        gradient = product(round_silu_product_gradient(gradient, gate_up), columns, column_scale)
        return gradient.to(ctx.dtype), *[None] * 8


class Fp8(nn.Linear):
    """What layers in fp8 have in common: scales, and the copy for the backward pass, none of which is saved."""

    def give_scales(self, weight: torch.Tensor, with_gradient: bool) -> torch.Tensor:
        """Keep what belongs to a weight [N,K], and return it in e4m3."""
        rows, scale = quantize_rows(weight)
        self.register_buffer("scale", scale.t(), persistent=False)  # [1,N]
        columns, column_scale = quantize_rows(weight.t()) if with_gradient else (None, None)
        self.register_buffer("columns", columns, persistent=False)  # [K,N]
        self.register_buffer("column_scale", column_scale.t() if with_gradient else None, persistent=False)  # [1,K]
        return rows

    def scales_and_columns(self) -> tuple:
        return self.scale, self.columns, self.column_scale

    def product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, of_norm: bool) -> torch.Tensor:
        """x [...,K] to [...,N]; whether x comes from a norm, which it is the quicker for. A gradient goes no further
        where there is no copy of the weights for it.
        """
        x = x.detach() if self.columns is None else x
        y = _Product.apply(x.flatten(0, -2), of_norm, bias, weight, *self.scales_and_columns())
        return y.unflatten(0, x.shape[:-1])


class Fp8Linear(Fp8):
    """A linear layer in fp8; its `weight` is in e4m3."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.weight, self.bias, of_norm=False)


class Fp8FirstOfFused(Fp8, FirstOfFused):
    """The joint product of a group of layers in fp8."""

    def joint_product(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.joint_weight, None, of_norm=True)


def silu_mlp(gate_proj: Fp8FirstOfFused, down_proj: Fp8Linear, x: torch.Tensor) -> torch.Tensor:
    """A Llama's MLP of a norm's output [M,K]: [M,K]. Between its products nothing is read twice to be rounded."""
    first = gate_proj.joint_weight, *gate_proj.scales_and_columns()
    return _SiluMlp.apply(x, *first, down_proj.weight, *down_proj.scales_and_columns())


def _convert(module: nn.Module, with_gradient: bool) -> None:
    parts = list(module.modules())
    for layer in parts:
        if type(layer) is nn.Linear and _fits(layer.weight):
            layer.__class__ = Fp8Linear
            layer.weight.data = layer.give_scales(layer.weight.data, with_gradient)
        elif type(layer) is FirstOfFused and _fits(layer.joint_weight):
            group = [part for part in parts if getattr(part, "others", None) is layer.others]
            layer.__class__ = Fp8FirstOfFused
            layer.joint_weight = layer.give_scales(layer.joint_weight, with_gradient)
            for part, rows in zip(group, layer.joint_weight.split(layer.widths), strict=True):
                part.weight.data = rows
    count = sum(isinstance(part, Fp8) for part in parts)
    others = sum(type(part) in (nn.Linear, FirstOfFused) for part in parts)
    logging.info("%d linear layers compute in fp8, %d do not, of %s.", count, others, type(module[0]).__name__)


def _fits(weight: torch.Tensor) -> bool:
    frozen = not weight.requires_grad
    return frozen and weight.dtype == torch.bfloat16 and all(size % MULTIPLE == 0 for size in weight.shape)
