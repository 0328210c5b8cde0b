"""bitsandbytes' 8-bit layers (LLM.int8) that keep nothing for the backward pass.

As they are, they hold each input until then, for a gradient of the weights that frozen ones do not have, and in a way
that recomputing layers (`model.llm_grad_checkpoint`) cannot undo.
"""

import torch


def keep_no_inputs(llm: torch.nn.Module) -> None:
    """Let the 8-bit layers of a frozen model give the gradient of their inputs from their weights alone."""
    for layer in llm.modules():
        if type(layer).__name__ == "Linear8bitLt":
            layer.forward = _keeping_nothing(layer, layer.forward)


def _keeping_nothing(layer, forward):
    return lambda x: _Product.apply(x, layer, forward)


class _Product(torch.autograd.Function):
    """x [...,K] to [...,N]; the gradient is of x alone."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, layer, forward) -> torch.Tensor:
        ctx.state, ctx.dtype = layer.state, x.dtype
        return forward(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        scale = ctx.state.SCB.unsqueeze(1) / 127  # of each row of the weights [N,K]
        weight = ctx.state.CB.to(ctx.dtype, copy=True).mul_(scale)
        return gradient.to(ctx.dtype) @ weight, None, None
