"""A language model as a decoding step on a GPU runs it: layers compiled, with kernels of ours.

A step waits for memory: for the weights, and for the keys and values of earlier tokens. The kernels
(`kernels/decoding.py`) read both at the memory's speed. The compiler fuses the norms, rotations and activations between
them.

The compiled model is a copy of the modules that shares all weights, so that the model itself stays as it is for other
threads and for training.

B batch, L cache positions, H heads, G of keys and of values, D width of a head.
"""

import torch
from torch import nn

from minigpt4.common import compat
from minigpt4.fast.compilation import same_kernels
from minigpt4.fast.decoding.kv_cache import KVCache
from minigpt4.fast.self_check import shared_copy
from minigpt4.quantization.bitsandbytes import BLOCK, LowBitLinear

ATTENTION = "minigpt4_decoding"
# Versions of a compiled layer: one for a single row, one for several, and some for sizes that change later.
MAX_COMPILATIONS = 32


def compiled_copy(llm: nn.Module) -> nn.Module:
    """A copy of a language model for steps of one token, with shared weights, kernels, and compiled layers.

    All layers share one compilation. Each gets its own part of the cache: the index by which it would look that up
    would make every layer a case of its own for the compiler.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    copied = shared_copy(llm)
    compat.set_attention_implementation(copied.config.get_text_config(), ATTENTION)
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in KERNEL_LAYERS:  # which read a single row's weights by our kernels
                setattr(parent, name, KERNEL_LAYERS[type(child)](child))
    layers = compat.decoder_layers(copied)
    for index, layer in enumerate(layers):
        layers[index] = CompiledLayer(compat.without_recomputation(layer), index)
    return copied


class CompiledLayer(nn.Module):
    """A decoder layer, compiled, on its own part of the cache that it is called with."""

    def __init__(self, layer: nn.Module, index: int):
        super().__init__()
        self.layer, self.index = layer, index
        self.compiled = torch.compile(layer.forward, options=same_kernels())

    def forward(self, *args, **kwargs):
        # Models name the argument differently.
        name, cache = next((name, value) for name, value in kwargs.items() if isinstance(value, KVCache))
        own = cache.layers[self.index]
        for cached in (own.keys, own.values):
            compat.may_be_dynamic(cached, 1)  # longer caches need no other compilation
        compat.raise_recompile_limit(MAX_COMPILATIONS)
        return self.compiled(*args, **{**kwargs, name: own})

    def __getattr__(self, name: str):
        """Attributes that models read of their layers, such as `attention_type`."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    visible: torch.Tensor,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """An attention function for transformers, by our kernel. The mask is ignored.

    Args:
        query: [B,H,1,D]. key, value: [B,G,L,D]. visible: [B], how many positions each row sees.

    Returns:
        [B,1,H,D], and no weights.
    """
    from minigpt4.kernels.decoding import attend_cache

    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend_cache(query.squeeze(2), key.transpose(1, 2), value.transpose(1, 2), visible, scaling)
    return out.unsqueeze(1), None


class KernelLinear(nn.Linear):
    """A linear layer that computes a single row by our kernel, several rows as usual."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[:-1].numel() > 1:
            return super().forward(x)
        from minigpt4.kernels.decoding import single_row_linear

        y = single_row_linear(x, self.weight)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class KernelLowBitLinear(LowBitLinear):
    """The same for quantised weights, which are dequantised as they are read. In 4 bit rows must be whole blocks."""

    @classmethod
    def of(cls, layer: LowBitLinear) -> "KernelLowBitLinear":
        return cls.replacing(layer, layer.weight, layer.scale, layer.code)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole_blocks = self.code is None or self.in_features % BLOCK == 0
        if x.shape[:-1].numel() > 1 or not whole_blocks:
            return super().forward(x)
        from minigpt4.kernels.decoding import single_row_linear

        if self.code is None:
            y = single_row_linear(x, self.weight, self.scale)
        else:
            y = compat.gemv_4bit(x, self.weight, [self.out_features, x.shape[-1]], self.scale, self.code, BLOCK)
        return y if self.bias is None else y + self.bias.to(y.dtype)


# Other kinds of layers stay as they are.
KERNEL_LAYERS = {nn.Linear: KernelLinear, LowBitLinear: KernelLowBitLinear.of}
