"""A piece of a packed batch through a frozen Llama, with what transformers' layers do one by one joined up.

The numbers are those of transformers' forward pass to rounding. What differs is where they are computed:
- Each residual addition stands beside the norm that follows it, across the bounds of layers.
- Queries, keys and values stay side by side, as their joint product leaves them, and so do gate and up.
- In the last layer, only rows with labels go on behind the attention.

T rows, K labels, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F

from minigpt4.fast.attention import Segments, joint_attention
from minigpt4.fast.fused_linear import FirstOfFused
from minigpt4.fast.packing.batch import MicroBatch
from minigpt4.kernels.dispatch import use_triton
from minigpt4.quantization import fp8


def fits(llm) -> bool:
    """Whether `llm` is a frozen Llama as transformers wrote it, on a GPU in 16 bit, with joint projections and fixed
    rotations.
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
        type(layer) is llama.LlamaDecoderLayer
        and "forward" not in vars(layer)  # one that recomputes its activations
        and isinstance(layer.self_attn.q_proj, FirstOfFused)
        and isinstance(layer.mlp.gate_proj, FirstOfFused)
        for layer in llm.model.layers
    )


class FusedLlama:
    """Logits of a Llama that `fits`, by its weights where they are.

    On a GPU the embeddings of rows that all sequences share get a part of their gradient only. Training has no use for
    it: they come before the images, and belong to a frozen model.
    """

    def __init__(self, llm, compiled: bool):
        """compiled: by torch.compile, one compilation for all layers and lengths."""
        self.llm, self.before, self.behind = llm, _up_to_attention, _behind_attention
        if compiled:
            self.before, self.behind = (torch.compile(part, dynamic=True) for part in (self.before, self.behind))

    def __call__(self, embeds: torch.Tensor, piece: MicroBatch) -> torch.Tensor:
        """The embeddings [1,T,D] of a piece to the logits [1,K,V] of its rows with labels."""
        llama, inputs = self.llm.model, piece.llm_inputs()
        segments, labelled = inputs["segments"], inputs["logits_to_keep"]
        angles = llama.rotary_emb(embeds, inputs["position_ids"])  # cosines and sines [1,T,d], both halves alike
        rotation = tuple(x[0, :, : x.shape[-1] // 2].contiguous() for x in angles)
        hidden, addend = embeds, embeds * 0  # a sum, with a gradient, as that of all other layers
        for layer in llama.layers:
            hidden, attended = self.before(layer, hidden, addend, rotation, segments)
            if layer is llama.layers[-1]:
                hidden, attended = (x.index_select(1, labelled) for x in (hidden, attended))
            hidden, addend = self.behind(layer, hidden, attended)
        return self.llm.lm_head(llama.norm(hidden + addend))


def _up_to_attention(layer, hidden, addend, rotation, segments: Segments) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's input [1,T,D], and what it attended to [1,T,H*d]."""
    attention, hidden = layer.self_attn, hidden + addend
    attended = _attend(attention, layer.input_layernorm(hidden).squeeze(0), rotation, segments)
    return hidden, attended.flatten(1).unsqueeze(0)


def _behind_attention(layer, hidden, attended) -> tuple[torch.Tensor, torch.Tensor]:
    """The rest of a layer: its output [1,T,D] as a sum of two."""
    hidden = hidden + layer.self_attn.o_proj(attended)
    return hidden, _mlp(layer.mlp, layer.post_attention_layernorm(hidden).squeeze(0)).unsqueeze(0)


def _attend(attention, x: torch.Tensor, rotation, segments: Segments) -> torch.Tensor:
    """Rows [T,D] to what their queries, rotated as the keys are by angles [T,d/2], attend to [T,H,d]."""
    joint, d, scaling = attention.q_proj, attention.head_dim, attention.scaling
    heads = sum(joint.widths) // d
    groups = heads // (attention.num_key_value_groups + 2)
    if use_triton(x):
        from minigpt4.fast.rope_attention import rotated_attention

        return rotated_attention(x, joint, d, groups, *rotation, *segments, scaling)
    qkv, (cos, sin) = joint.joint_product(x).unflatten(1, (heads, d)), (angle.unsqueeze(1) for angle in rotation)
    first, second = qkv[:, :-groups].chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return joint_attention(torch.cat([turned, qkv[:, -groups:]], dim=1), groups, scaling, segments)


def _mlp(mlp, x: torch.Tensor) -> torch.Tensor:
    """Rows [T,D] to [T,D]."""
    if isinstance(mlp.gate_proj, fp8.Fp8) and isinstance(mlp.down_proj, fp8.Fp8) and mlp.down_proj.bias is None:
        return fp8.silu_mlp(mlp.gate_proj, mlp.down_proj, x)
    return mlp.down_proj(_silu_product(mlp.gate_proj.joint_product(x)))


def _silu_product(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of the halves of [T,2F]: [T,F]."""
    if use_triton(gate_up):
        from minigpt4.kernels.llama import silu_product

        return silu_product(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
