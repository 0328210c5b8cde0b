"""Frozen linear layers in fp8: products at twice the rate of 16 bit on a Hopper GPU, of rounded weights and inputs.

Weights are rounded to e4m3 once, inputs at each step, with one scale a row by its largest entry, as in torchao's
row-wise recipe. The backward pass gives the gradient of the input by a product of the same kind, with a second copy of
the weights that is rounded by columns: the GPU wants both factors contiguous in the dimension that it sums over. So two
copies in 8 bit take the place of one in 16 bit.

Gradients are in e4m3 too: since each row has a scale, the third bit of the mantissa is worth more than the range of
e5m2. Partial sums stay in the tensor cores in both directions (`use_fast_accum`), as that recipe does with scales by
rows.

M tokens, K inputs, N outputs.
"""

import importlib.util

import torch
from torch import nn

from minigpt4.common import compat
from minigpt4.common.errors import ConfigError
from minigpt4.quantization.fp8_rounding import (
    Quantized,
    quantize_rows,
    quantize_rows_by_kernel,
    quantize_silu_product,
    quantize_silu_product_gradient,
)

# The GPU's product takes sizes that are multiples of this.
MULTIPLE = 16


def check_fp8_supported(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError where `run.fp8` cannot be had: on this GPU, in this type, without Triton, or for this model."""
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


def supports_fp8(layer: nn.Module) -> bool:
    """Whether a layer can become an `Fp8Linear`: a frozen nn.Linear in bfloat16 with sizes that the GPU takes."""
    if type(layer) is not nn.Linear or layer.weight.requires_grad or layer.weight.dtype != torch.bfloat16:
        return False
    if layer.weight.is_meta:  # offloaded to the host or the disk
        return False
    return all(size % MULTIPLE == 0 for size in layer.weight.shape)


def convert_linear_layers(module: nn.Module, with_gradient: bool) -> None:
    """Exchange the linear layers of a module for layers in fp8, where `supports_fp8`.

    with_gradient: with the second copy of the weights, without which no gradient is passed on.
    """
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if supports_fp8(child):
                setattr(parent, name, Fp8Linear(child, with_gradient))


def fp8_matmul(
    quantized: Quantized, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Quantised rows [M,K] times weight [N,K] e4m3 with scale [1,N] float32, plus bias [N]: [M,N] bfloat16."""
    rows, row_scale = quantized
    bias = None if bias is None else bias.bfloat16()
    return compat.scaled_mm(rows, weight.t(), row_scale, scale, bias)


class _Fp8Linear(torch.autograd.Function):
    """`fp8_matmul` of x [M,K], with a gradient for x alone.

    An x that comes from a norm is rounded in the norm's kernel, its gradient by ours; any other x the other way round.
    """

    @staticmethod
    def forward(ctx, x, from_norm, bias, weight, scale, columns, column_scale):
        ctx.save_for_backward(columns, column_scale)
        ctx.dtype, ctx.from_norm = x.dtype, from_norm
        return fp8_matmul(quantize_rows(x) if from_norm else quantize_rows_by_kernel(x), weight, scale, bias)

    @staticmethod
    def backward(ctx, gradient):
        rounded = quantize_rows_by_kernel(gradient) if ctx.from_norm else quantize_rows(gradient)
        return fp8_matmul(rounded, *ctx.saved_tensors).to(ctx.dtype), *[None] * 6


class Fp8Linear(nn.Linear):
    """A frozen linear layer in fp8, with the weights of another.

    `weight` [N,K] is e4m3, `scale` [1,N] float32; `columns` [K,N] and `column_scale` [1,K] are the copy for the
    backward pass, None where no gradient is passed on. Scales and copy are not saved.

    Args:
        layer: a layer that `supports_fp8`.
        with_gradient: whether gradients of the input are wanted.
        from_norm: whether inputs come from a norm, which decides how they are rounded fastest.
    """

    def __init__(self, layer: nn.Linear, with_gradient: bool, from_norm: bool = False):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.bias, self.from_norm = layer.bias, from_norm
        weight = layer.weight.data
        rows, scale = quantize_rows(weight)
        self.weight = nn.Parameter(rows, requires_grad=False)
        self.register_buffer("scale", scale.t(), persistent=False)
        columns, column_scale = quantize_rows(weight.t()) if with_gradient else (None, None)
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("column_scale", column_scale.t() if with_gradient else None, persistent=False)
        self.train(layer.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach() if self.columns is None else x
        factors = self.weight, self.scale, self.columns, self.column_scale
        y = _Fp8Linear.apply(x.flatten(0, -2), self.from_norm, self.bias, *factors)
        return y.unflatten(0, x.shape[:-1])


class _SiluMlp(torch.autograd.Function):
    """down(silu(gate) * up) of x [M,K], with a gradient for x alone."""

    @staticmethod
    def forward(ctx, x, weight, scale, columns, column_scale, down, down_scale, down_columns, down_column_scale):
        gate_up = fp8_matmul(quantize_rows(x), weight, scale)
        ctx.save_for_backward(gate_up, columns, column_scale, down_columns, down_column_scale)
        ctx.dtype = x.dtype
        return fp8_matmul(quantize_silu_product(gate_up), down, down_scale)

    @staticmethod
    def backward(ctx, gradient):
        gate_up, columns, column_scale, down_columns, down_column_scale = ctx.saved_tensors
        gradient = fp8_matmul(quantize_rows_by_kernel(gradient), down_columns, down_column_scale)
        gradient = fp8_matmul(quantize_silu_product_gradient(gradient, gate_up), columns, column_scale)
        return gradient.to(ctx.dtype), *[None] * 8


def silu_mlp(gate_up: Fp8Linear, down: Fp8Linear, x: torch.Tensor) -> torch.Tensor:
    """A Llama's MLP of a norm's output [M,K]: [M,K]. Nothing between its products is read twice to be rounded."""
    first = gate_up.weight, gate_up.scale, gate_up.columns, gate_up.column_scale
    second = down.weight, down.scale, down.columns, down.column_scale
    return _SiluMlp.apply(x, *first, *second)
