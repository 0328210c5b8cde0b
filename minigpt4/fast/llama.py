"""A frozen Llama on a micro-batch, with neighbouring steps of transformers' layers computed together.

Its layers may have LoRA adapters, which may train.

The numbers are those of transformers' forward pass, to rounding. Three things differ:
- A residual addition is computed with the norm that follows it, across the bounds of layers.
- Queries, keys and values stay in one tensor, as their joint product gives them; so do gate and up.
- In the last layer, only tokens with labels go through the MLP.

T tokens, K labels, D width, V vocabulary, r rank.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from minigpt4.common.facts import is_adapter
from minigpt4.fast.attention import Segments, joint_attention
from minigpt4.fast.compilation import compile_for_any_length, same_kernels
from minigpt4.fast.fused_linear import GROUPS, FusedSlice
from minigpt4.fast.packing.batch import MicroBatch
from minigpt4.kernels.dispatch import use_triton
from minigpt4.quantization.fp8 import Fp8Linear, silu_mlp


def supports_fused_llama(llm) -> bool:
    """Whether `FusedLlama` can compute a model: a Llama of transformers, its projections fused, its rotations fixed.

    All but adapters must be frozen. On a GPU it must be in 16 bit.
    """
    from transformers.models.llama import modeling_llama as llama

    if type(llm) is not llama.LlamaForCausalLM or llm.config.hidden_act != "silu":
        return False
    weight = llm.get_input_embeddings().weight  # never in low bits
    trained = [name for name, parameter in llm.named_parameters() if parameter.requires_grad]
    if not all(map(is_adapter, trained)) or (weight.is_cuda and not use_triton(weight)):
        return False
    if llm.model.rotary_emb.rope_type not in ("default", "linear", "llama3"):
        return False
    return all(
        type(layer) is llama.LlamaDecoderLayer  # not one that recomputes its activations
        and all(isinstance(_without_adapter(getattr(layer.self_attn, name)), FusedSlice) for name in GROUPS[0])
        and all(isinstance(_without_adapter(getattr(layer.mlp, name)), FusedSlice) for name in GROUPS[1])
        for layer in llm.model.layers
    )


class Adapter(NamedTuple):
    """What peft puts around a linear layer: it adds B A dropout(x) * scaling to the output."""

    a: torch.Tensor  # [r,K]
    b: torch.Tensor  # [N,r]
    scaling: float
    dropout: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        low = F.linear(F.dropout(x, self.dropout), self.a.to(x.dtype))
        return F.linear(low, self.b.to(x.dtype)) * self.scaling


Adapters = Mapping[str, Adapter]  # of a decoder layer, by the name of the linear layer


class FusedLlama:
    """Logits of a Llama that `supports_fused_llama`, computed with the model's own weights.

    Without adapters, the embeddings of the tokens that all sequences share get only a part of their gradient on a GPU.
    Training does not use it: these tokens precede the images and belong to a frozen model.
    """

    def __init__(self, llm, compiled: bool):
        """compiled: by torch.compile, with one compilation for all layers and lengths."""
        self.llm, self.pre_attention, self.post_attention = llm, _pre_attention, _post_attention
        if compiled:
            # On a CPU, torch.compile looks into the attention, which depends on the lengths of sequences.
            on_gpu = use_triton(llm.get_input_embeddings().weight)
            compile_function = compile_for_any_length if on_gpu else functools.partial(torch.compile, dynamic=True)
            self.pre_attention = compile_function(_pre_attention, options=same_kernels())
            self.post_attention = compile_function(_post_attention, options=same_kernels())

    def __call__(
        self, embeds: torch.Tensor, micro_batch: MicroBatch, leaves: Mapping[nn.Parameter, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The embeddings [1,T,D] of a micro-batch to the logits [1,K,V] of its tokens with labels.

        leaves: tensors that stand for the parameters of adapters.
        """
        llama, inputs = self.llm.model, micro_batch.llm_inputs()
        segments, labelled = inputs["segments"], inputs["logits_to_keep"]
        angles = llama.rotary_emb(embeds, inputs["position_ids"])  # cosines and sines [1,T,d], both halves alike
        rotation = tuple(x[0, :, : x.shape[-1] // 2].contiguous() for x in angles)
        # The first layer gets a sum of two tensors that need gradients, as all others do: one compilation serves all.
        hidden, addend = embeds, embeds * 0
        adapters_of_layers = [adapters_of(layer, leaves or {}) for layer in llama.layers]
        trains = any(adapters_of_layers)
        for layer, adapters in zip(llama.layers, adapters_of_layers, strict=True):
            hidden, attended = self.pre_attention(layer, adapters, hidden, addend, rotation, segments, trains)
            if layer is llama.layers[-1]:
                hidden, attended = (x.index_select(1, labelled) for x in (hidden, attended))
            hidden, addend = self.post_attention(layer, adapters, hidden, attended)
        return self.llm.lm_head(llama.norm(hidden + addend))


def adapters_of(layer: nn.Module, leaves: Mapping[nn.Parameter, torch.Tensor]) -> Adapters:
    """The adapters in a decoder layer. leaves: tensors that stand for parameters."""
    found = {}
    for name, part in (*layer.self_attn.named_children(), *layer.mlp.named_children()):
        if _without_adapter(part) is not part:
            a, b, dropout = (each["default"] for each in (part.lora_A, part.lora_B, part.lora_dropout))
            rate = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
            a, b = (leaves.get(each.weight, each.weight) for each in (a, b))
            found[name] = Adapter(a, b, part.scaling["default"], rate)
    return found


def _without_adapter(layer: nn.Module) -> nn.Module:
    """The layer inside of peft's."""
    return getattr(layer, "base_layer", layer)


def _pre_attention(
    layer, adapters: Adapters, hidden, addend, rotation, segments: Segments, trains: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum that enters a layer [1,T,D], and the output of its attention's heads [1,T,H*d].

    trains: whether adapters of any layer may train.
    """
    attention, hidden = layer.self_attn, hidden + addend
    attended = _attend(attention, adapters, layer.input_layernorm(hidden).squeeze(0), rotation, segments, trains)
    return hidden, attended.flatten(1).unsqueeze(0)


def _post_attention(layer, adapters: Adapters, hidden, attended) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of a layer [1,T,D] as two terms, to be added with the next layer's norm."""
    hidden = hidden + _linear(layer.self_attn, "o_proj", adapters, attended)
    return hidden, _mlp(layer.mlp, adapters, layer.post_attention_layernorm(hidden).squeeze(0)).unsqueeze(0)


def _attend(attention, adapters: Adapters, x: torch.Tensor, rotation, segments: Segments, trains: bool) -> torch.Tensor:
    """A norm's output [T,D] to the output of the attention's heads [T,H,d]. rotation: cosines and sines [T,d/2]."""
    qkv_layer, d, scaling = _joint(attention, GROUPS[0]), attention.head_dim, attention.scaling
    added = _added(attention, GROUPS[0], adapters, x)
    heads = qkv_layer.out_features // d
    num_kv_heads = heads // (attention.num_key_value_groups + 2)
    if use_triton(x):
        from minigpt4.fast.rope_attention import rope_attention

        return rope_attention(x, qkv_layer, d, num_kv_heads, *rotation, *segments, scaling, added, trains)
    qkv = qkv_layer(x) if added is None else qkv_layer(x) + added
    qkv = qkv.unflatten(1, (heads, d))
    cos, sin = (angle.unsqueeze(1) for angle in rotation)
    first, second = qkv[:, :-num_kv_heads].chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return joint_attention(torch.cat([rotated, qkv[:, -num_kv_heads:]], dim=1), num_kv_heads, scaling, segments)


def _mlp(mlp, adapters: Adapters, x: torch.Tensor) -> torch.Tensor:
    """A norm's output [T,D] to the MLP's [T,D]."""
    gate_up, down = _joint(mlp, GROUPS[1]), mlp.down_proj
    added = _added(mlp, GROUPS[1], adapters, x)
    if added is None and isinstance(gate_up, Fp8Linear) and isinstance(down, Fp8Linear) and down.bias is None:
        return silu_mlp(gate_up, down, x)
    product = gate_up(x) if added is None else gate_up(x) + added
    return _linear(mlp, "down_proj", adapters, _silu_product(product))


def _joint(parent: nn.Module, names: tuple[str, ...]) -> nn.Module:
    """The layer that computes the linear layers of these names together."""
    return _without_adapter(getattr(parent, names[0])).fused.joint


def _added(parent: nn.Module, names: tuple[str, ...], adapters: Adapters, x: torch.Tensor) -> torch.Tensor | None:
    """What adapters add to the output of a joint layer; None: nothing, since there are none."""
    if not any(name in adapters for name in names):
        return None
    widths = {name: _without_adapter(getattr(parent, name)).out_features for name in names}
    return torch.cat(
        [adapters[name](x) if name in adapters else x.new_zeros(len(x), widths[name]) for name in names], dim=-1
    )


def _linear(parent: nn.Module, name: str, adapters: Adapters, x: torch.Tensor) -> torch.Tensor:
    """The output of a linear layer with its adapter, if it has one."""
    output = _without_adapter(getattr(parent, name))(x)
    return output + adapters[name](x) if name in adapters else output


def _silu_product(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of the halves of [T,2F]: [T,F]."""
    if use_triton(gate_up):
        from minigpt4.kernels.llama import silu_product

        return silu_product(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
