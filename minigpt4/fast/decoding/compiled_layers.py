"""The layers of a language model as a decoding step on a GPU runs them: compiled, with kernels of our own.

What a step waits for is memory: the weights, and what was said before. The kernels (`decoding_kernels.py`) read both at
its speed; what stands between them, norms, rotations and activations, the compiler joins.

B batch, L slots, H heads, G of keys and values, D width of a head.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from minigpt4.quantization import bitsandbytes as low_bit

ATTENTION = "minigpt4_slots"
# Compilations of one layer: a single row, several, and what sizes change later. The layers share them.
MOST_COMPILATIONS = 32


@contextmanager
def compiled_layers(llm, slots) -> Iterator[None]:
    """In this thread, let the layers run compiled on `slots.KVCache`, for steps alone; all share one compilation.

    A layer gets its own part of the cache: its number, by which it would look it up, would make each one special.
    Answers that other threads compute meanwhile stay as they were, to rounding.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    config = llm.config.get_text_config()
    lists = (part for part in llm.modules() if isinstance(part, nn.ModuleList))
    layers = next(part for part in lists if len(part) == config.num_hidden_layers)
    products = [part for module in (*layers, llm.get_output_embeddings()) for part in module.modules()]
    products = [(part, type(part)) for part in products if type(part) in WITH_KERNEL]
    originals, implementation = [vars(layer).get("forward") for layer in layers], config._attn_implementation
    thread = threading.get_ident()

    def compile_layer(layer: nn.Module, own) -> None:
        for cached in (own.keys, own.values):
            torch._dynamo.maybe_mark_dynamic(cached, 1)  # longer caches are no reason to compile again
        original = layer.forward
        compiled = torch.compile(original)

        def forward(*args, **kwargs):
            if threading.get_ident() != thread:
                return original(*args, **kwargs)
            return compiled(*args, **{name: own if value is slots else value for name, value in kwargs.items()})

        layer.forward = forward

    try:
        config._attn_implementation = ATTENTION
        for part, kind in products:
            part.__class__ = WITH_KERNEL[kind]
        for layer, own in zip(layers, slots.layers, strict=True):
            compile_layer(layer, own)
        with torch._dynamo.config.patch(recompile_limit=MOST_COMPILATIONS):
            yield
    finally:
        config._attn_implementation = implementation
        for part, kind in products:
            part.__class__ = kind
        for layer, original in zip(layers, originals, strict=True):
            vars(layer).pop("forward", None)
            if original:
                layer.forward = original


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    seen: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers: of steps that say what they see by our kernel, of others transformers'.

    Args:
        query: [B,H,1,D]. key, value: [B,G,L,D]. seen: [B], how many slots each row sees. The mask is not looked at.

    Returns:
        [B,1,H,D], and no weights.
    """
    if seen is None:  # of another thread
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    from minigpt4.kernels.decoding import attend_cache

    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend_cache(query.squeeze(2), key.transpose(1, 2), value.transpose(1, 2), seen, scaling).unsqueeze(1), None


class KernelLinear(nn.Linear):
    """A linear layer that gives the product of a single row by our kernel, of others as usual."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _row_product(self, x) if _is_a_row(x) else super().forward(x)


class KernelLowBitLinear(low_bit.LowBitLinear):
    """Likewise, of weights that are turned back as they are read; in 4 bit where rows are of whole blocks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fits = self.code is None or self.in_features % low_bit.BLOCK == 0
        return _row_product(self, x) if fits and _is_a_row(x) else super().forward(x)


def _is_a_row(x: torch.Tensor) -> bool:
    return x.shape[:-1].numel() == 1 and not torch.is_grad_enabled()  # another thread may want gradients


def _row_product(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    from minigpt4.kernels import decoding as decoding_kernels

    if getattr(layer, "code", None) is not None:
        y = decoding_kernels.single_row_linear_4bit(
            x, layer.weight, layer.out_features, layer.scale, layer.code, low_bit.BLOCK
        )
    else:
        y = decoding_kernels.single_row_linear(x, layer.weight, getattr(layer, "scale", None))
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


# Classes, not functions for each module: those would be compiled one by one. Other kinds of layers stay as they are.
WITH_KERNEL = {nn.Linear: KernelLinear, low_bit.LowBitLinear: KernelLowBitLinear}
