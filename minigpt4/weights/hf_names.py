"""Renames BLIP-2's tensors in Hugging Face folders to our names, which are those of the published file.

Covered is the query path of transformers' `Blip2VisionModel` and `Blip2QFormerModel`.
"""

import re

import torch

from minigpt4.weights.checkpoint import CheckpointError

VISION, QFORMER = "vision_model.", "qformer."
LN_VISION = "vision_model.post_layernorm."

# (theirs, ours): prefixes of names; `#` is the number of a layer. The first match is used.
VISION_NAMES = (
    ("vision_model.embeddings.class_embedding", "cls_token"),
    ("vision_model.embeddings.position_embedding", "pos_embed"),
    ("vision_model.embeddings.patch_embedding.", "patch_embed.proj."),
    ("vision_model.encoder.layers.#.self_attn.qkv.", "blocks.#.attn.qkv."),
    ("vision_model.encoder.layers.#.self_attn.projection.", "blocks.#.attn.proj."),
    ("vision_model.encoder.layers.#.layer_norm1.", "blocks.#.norm1."),
    ("vision_model.encoder.layers.#.layer_norm2.", "blocks.#.norm2."),
    ("vision_model.encoder.layers.#.mlp.", "blocks.#.mlp."),
)
QFORMER_NAMES = (
    ("query_tokens", "query_tokens"),
    (LN_VISION, "ln_vision."),
    ("qformer.layernorm.", "Qformer.bert.embeddings.LayerNorm."),
    ("qformer.embeddings.layernorm.", "Qformer.bert.embeddings.LayerNorm."),  # InstructBLIP
    ("qformer.encoder.layer.#.attention.attention.", "Qformer.bert.encoder.layer.#.attention.self."),
    ("qformer.encoder.layer.#.crossattention.attention.", "Qformer.bert.encoder.layer.#.crossattention.self."),
    ("qformer.encoder.layer.#.", "Qformer.bert.encoder.layer.#."),
)
State = dict[str, torch.Tensor]


def vision_from_hf(state: State) -> State:
    """The encoder of a folder under our names. Other tensors are dropped.

    Raises CheckpointError if the attention has a bias for the keys: BLIP-2's encoder has none.
    """
    ours = _renamed(state, VISION_NAMES)
    for name in [name for name in ours if name.endswith("attn.qkv.bias")]:
        q, k, v = ours.pop(name).chunk(3)
        if k.any():
            raise CheckpointError(f"{name} has a part for the keys that is not zero: this is no encoder of BLIP-2.")
        stem = name.removesuffix("qkv.bias")
        ours |= {f"{stem}q_bias": q, f"{stem}v_bias": v}
    return ours


def qformer_from_hf(state: State) -> State:
    """The query path of a folder's Q-Former, its queries and ln_vision under our names. Other tensors are dropped."""
    return _renamed(state, QFORMER_NAMES)


def _renamed(state: State, names) -> State:
    # A name without a dot at its end is a whole name.
    patterns = (re.escape(old).replace(r"\#", r"(\d+)") + ("" if old.endswith(".") else "$") for old, _ in names)
    rules = [(re.compile(pattern), new.replace("#", r"\1")) for pattern, (_, new) in zip(patterns, names, strict=True)]
    renamed = {}
    for name, value in state.items():
        for pattern, new in rules:
            if pattern.match(name):
                renamed[pattern.sub(new, name, count=1)] = value
                break
    return renamed
