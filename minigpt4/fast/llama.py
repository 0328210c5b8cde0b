"""A frozen Llama on a micro-batch, with neighbouring steps of transformers' layers computed together.

The numbers are those of transformers' forward pass, to rounding. Three things differ:
- A residual addition is computed with the norm that follows it, across the bounds of layers.
- Queries, keys and values stay in one tensor, as their joint product gives them; so do gate and up.
- In the last layer, only tokens with labels go through the MLP.

T tokens, K labels, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F

from minigpt4.fast.attention import Segments, joint_attention
from minigpt4.fast.fused_linear import GROUPS, FusedSlice
from minigpt4.fast.packing.batch import MicroBatch
from minigpt4.kernels.dispatch import use_triton
from minigpt4.quantization.fp8 import Fp8Linear, silu_mlp


def supports_fused_llama(llm) -> bool:
    """Whether `FusedLlama` can compute a model: a frozen Llama of transformers, its projections fused, its rotations
    fixed.

    On a GPU it must be in 16 bit.
    """
    from transformers.models.llama import modeling_llama as llama

    if type(llm) is not llama.LlamaForCausalLM or llm.config.hidden_act != "silu":
        return False
    weight = llm.get_input_embeddings().weight  # never in low bits
    if any(p.requires_grad for p in llm.parameters()) or (weight.is_cuda and not use_triton(weight)):
        return False
    if llm.model.rotary_emb.rope_type not in ("default", "linear", "llama3"):
        return False
    return all(
        type(layer) is llama.LlamaDecoderLayer  # not one that recomputes its activations
        and all(isinstance(getattr(layer.self_attn, name), FusedSlice) for name in GROUPS[0])  # no adapters around them
        and all(isinstance(getattr(layer.mlp, name), FusedSlice) for name in GROUPS[1])
        for layer in llm.model.layers
    )


class FusedLlama:
    """Logits of a Llama that `supports_fused_llama`, computed with the model's own weights.

    On a GPU the embeddings of the tokens that all sequences share get only a part of their gradient. Training does not
    use it: these tokens precede the images and belong to a frozen model.
    """

    def __init__(self, llm, compiled: bool):
        """compiled: by torch.compile, with one compilation for all layers and lengths."""
        self.llm, self.pre_attention, self.post_attention = llm, _pre_attention, _post_attention
        if compiled:
            self.pre_attention = torch.compile(_pre_attention, dynamic=True)
            self.post_attention = torch.compile(_post_attention, dynamic=True)

    def __call__(self, embeds: torch.Tensor, micro_batch: MicroBatch) -> torch.Tensor:
        """The embeddings [1,T,D] of a micro-batch to the logits [1,K,V] of its tokens with labels."""
        llama, inputs = self.llm.model, micro_batch.llm_inputs()
        segments, labelled = inputs["segments"], inputs["logits_to_keep"]
        angles = llama.rotary_emb(embeds, inputs["position_ids"])  # cosines and sines [1,T,d], both halves alike
        rotation = tuple(x[0, :, : x.shape[-1] // 2].contiguous() for x in angles)
        # The first layer gets a sum of two tensors that need gradients, as all others do: one compilation serves all.
        hidden, addend = embeds, embeds * 0
        for layer in llama.layers:
            hidden, attended = self.pre_attention(layer, hidden, addend, rotation, segments)
            if layer is llama.layers[-1]:
                hidden, attended = (x.index_select(1, labelled) for x in (hidden, attended))
            hidden, addend = self.post_attention(layer, hidden, attended)
        return self.llm.lm_head(llama.norm(hidden + addend))


def _pre_attention(layer, hidden, addend, rotation, segments: Segments) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum that enters a layer [1,T,D], and the output of its attention's heads [1,T,H*d]."""
    attention, hidden = layer.self_attn, hidden + addend
    attended = _attend(attention, layer.input_layernorm(hidden).squeeze(0), rotation, segments)
    return hidden, attended.flatten(1).unsqueeze(0)


def _post_attention(layer, hidden, attended) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of a layer [1,T,D] as two terms, to be added with the next layer's norm."""
    hidden = hidden + layer.self_attn.o_proj(attended)
    return hidden, _mlp(layer.mlp, layer.post_attention_layernorm(hidden).squeeze(0)).unsqueeze(0)


def _attend(attention, x: torch.Tensor, rotation, segments: Segments) -> torch.Tensor:
    """A norm's output [T,D] to the output of the attention's heads [T,H,d]. rotation: cosines and sines [T,d/2]."""
    qkv_layer, d, scaling = attention.q_proj.fused.joint, attention.head_dim, attention.scaling
    heads = qkv_layer.out_features // d
    num_kv_heads = heads // (attention.num_key_value_groups + 2)
    if use_triton(x):
        from minigpt4.fast.rope_attention import rope_attention

        return rope_attention(x, qkv_layer, d, num_kv_heads, *rotation, *segments, scaling)
    qkv = qkv_layer(x).unflatten(1, (heads, d))
    cos, sin = (angle.unsqueeze(1) for angle in rotation)
    first, second = qkv[:, :-num_kv_heads].chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return joint_attention(torch.cat([rotated, qkv[:, -num_kv_heads:]], dim=1), num_kv_heads, scaling, segments)


def _mlp(mlp, x: torch.Tensor) -> torch.Tensor:
    """A norm's output [T,D] to the MLP's [T,D]."""
    gate_up = mlp.gate_proj.fused.joint
    if isinstance(gate_up, Fp8Linear) and isinstance(mlp.down_proj, Fp8Linear) and mlp.down_proj.bias is None:
        return silu_mlp(gate_up, mlp.down_proj, x)
    return mlp.down_proj(_silu_product(gate_up(x)))


def _silu_product(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of the halves of [T,2F]: [T,F]."""
    if use_triton(gate_up):
        from minigpt4.kernels.llama import silu_product

        return silu_product(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
