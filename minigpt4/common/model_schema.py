"""The keys of the section `model:` of MiniGPT-4, with type, default and meaning, as in `common/schema.py`.

They have a file of their own, so that a reader of the model meets no other section.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from minigpt4.common.settings import setting

BLIP2_URL = (
    "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/blip2_pretrained_flant5xxl.pth"
)


@dataclass
class VitSizes:
    """`model.vit_model` as a mapping: sizes of the vision encoder. All of them are required."""

    embed_dim: int = setting(1408, at_least=1)
    depth: int = setting(39, at_least=1)
    num_heads: int = setting(16, at_least=1)
    mlp_ratio: float = setting(4.3637, more_than=0)
    patch_size: int = setting(14, at_least=1)


@dataclass
class QFormerSizes:
    """`model.qformer`. The defaults are the sizes of bert-base."""

    hidden_size: int = setting(768, at_least=1)
    num_hidden_layers: int = setting(12, at_least=1)
    num_attention_heads: int = setting(12, at_least=1)
    intermediate_size: int = setting(3072, at_least=1)
    cross_attention_freq: int = setting(2, at_least=1)
    hidden_dropout_prob: float = setting(0.1, at_least=0, less_than=1)
    attention_probs_dropout_prob: float = setting(0.1, at_least=0, less_than=1)


@dataclass
class LoraSettings:
    """`model.lora`: adapters in linear layers of the language model. The defaults are those of MiniGPT-v2."""

    r: int = setting(64, at_least=1)
    """Rank."""
    alpha: float = setting(16.0, more_than=0)
    """The adapters' output is multiplied by alpha / r."""
    dropout: float = setting(0.05, at_least=0, less_than=1)
    """Share of the adapters' inputs that training drops."""
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Names of the layers that get adapters."""
    layers: list[int] | None = None
    """Numbers of the decoder layers that get adapters, from 0; null: all."""


VIT_KEYS = tuple(size.name for size in fields(VitSizes))

# Vision encoders by name. `eva_clip_g` is the published 1B encoder; the first 39 of its 40 blocks are used.
VIT_MODELS = {
    "eva_clip_g": {"patch_size": 14, "embed_dim": 1408, "depth": 39, "num_heads": 16, "mlp_ratio": 4.3637},
    "eva_tiny": {"patch_size": 8, "embed_dim": 256, "depth": 6, "num_heads": 4, "mlp_ratio": 3.0},
}


@dataclass
class MiniGPT4Config:
    """The `model:` section with `arch: mini_gpt4`."""

    arch: str = "mini_gpt4"
    """Registered name of the model."""
    model_type: str = "pretrain_vicuna"
    """Which default YAML of the model to start from: `pretrain_vicuna` or `tiny`."""

    image_size: int = setting(224, at_least=1)
    """Side of the square input image, in pixels."""
    vit_model: Any = setting("eva_clip_g", keys=VitSizes, kind="name")
    """`eva_clip_g`, `eva_tiny`, or a mapping {embed_dim, depth, num_heads, mlp_ratio, patch_size}."""
    vit_weights: str | None = setting("published", kind="path")
    """The encoder's weights: a file, a URL, or a BLIP-2's folder in Hugging Face format; `published`: those of the
    named encoder; null: random."""
    vit_precision: str = setting("fp16", choices=("fp16", "fp32"))
    """`fp16`: the run's 16-bit type on a GPU, float32 on a CPU. `fp32`: float32 everywhere."""
    freeze_vit: bool = True
    """Do not train the encoder and ln_vision."""
    drop_path_rate: float = setting(0.0, at_least=0, less_than=1)
    """Stochastic depth of an encoder that is trained."""
    use_grad_checkpoint: bool = False
    """Recompute the encoder's activations in the backward pass, for an encoder that is trained."""

    q_former_model: str | None = setting(BLIP2_URL, kind="path")
    """Weights of the Q-Former, its queries and ln_vision: a file, a URL, or a BLIP-2's folder; null: random."""
    qformer: dict[str, Any] = setting(dict, keys=QFormerSizes)
    """Sizes that differ from bert-base."""
    num_query_token: int = setting(32, at_least=1)
    """Vectors per image."""
    freeze_qformer: bool = True
    """Do not train the Q-Former and its queries."""

    load_vision: bool = True
    """Build encoder and Q-Former. `train.py` leaves them out if every dataset is cached features."""

    llama_model: str = setting("/path/to/vicuna/weights/", kind="path")
    """The language model: a folder in Hugging Face format, a hub id, or a .gguf file."""
    low_resource: bool = False
    """Load the language model in 8 bit."""
    load_in: str | None = setting(None, choices=("16bit", "8bit", "8bit_weights", "4bit"))
    """`16bit`, `8bit`, `4bit`, or `8bit_weights` (8 bit without bitsandbytes); overrides `low_resource`."""
    llm_grad_checkpoint: int = setting(0, at_least=0)
    """Number of the language model's layers, from the first, that recompute their activations in the backward pass."""
    llm_device_map: str | None = setting(None, choices=("auto",))
    """`auto` spreads a language model that does not fit on one GPU over several, for chat; null: the rank's GPU."""
    trust_remote_code: bool = False
    """Run the Python files that come with a language model, for models that transformers has no code of its own for.
    They can do whatever you can: read them first."""
    device_8bit: int | None = None
    """*Inert*: the quantised model is on the rank's own device."""

    projector: str = "linear"
    """What maps the Q-Former's output to the language model's width: `linear`, `mlp` (two layers with GELU), or a
    registered name."""
    train: list[str] | None = None
    """The parts that train: projector, query_tokens, qformer, vit, ln_vision, lora. null: the projector, the adapters
    if there are any, and the parts that `freeze_vit` and `freeze_qformer` do not freeze."""
    lora: Any = setting(None, keys=LoraSettings)
    """A mapping of r, alpha, dropout, target_modules, layers: LoRA adapters in the language model; null: none."""
    lora_r: int | None = None
    """`lora.r` in upstream's spelling; below 1: no adapters."""
    lora_alpha: float | None = setting(None, more_than=0)
    """`lora.alpha` in upstream's spelling."""
    lora_dropout: float | None = setting(None, at_least=0, less_than=1)
    """`lora.dropout` in upstream's spelling."""
    lora_target_modules: list[str] | None = None
    """`lora.target_modules` in upstream's spelling."""

    allow_llm_mismatch: bool = False
    """Accept a checkpoint that was trained with another language model of the same width."""

    ckpt: str | None = setting(None, kind="path")
    """MiniGPT-4 weights to start from: a file, or a run's folder (its newest checkpoint)."""
    prompt: str | None = ""
    """*Inert*, as in the first release; prompts come from `prompt_path`."""
    prompt_path: str | None = setting(None, kind="path")
    """Text file with one prompt a line; lines without <ImageHere> are ignored."""
    template: Any = None
    """The text around messages: `vicuna_v0`, `vicuna_v1`, `llama2`, `auto` (the tokenizer's own chat template), or a
    mapping of start, system, question, next_question, end. null: `prompt_template` and `end_sym`, which it replaces."""
    prompt_template: str = "{}"
    """Text around a prompt; `{}` stands for the prompt."""
    learn_on: str = setting("answers", choices=("answers", "all"))
    """What is learnt of a conversation: `answers` with their ends, or `all` texts after the first question, that is,
    later questions too."""
    max_txt_len: int = setting(32, at_least=1)
    """Most tokens of a caption, end_sym included; the rest is cut off."""
    end_sym: str = "\n"
    """Text that ends a caption; it is learnt with the caption."""

    @classmethod
    def from_section(cls, section: Mapping[str, Any]) -> "MiniGPT4Config":
        """The settings of a `model:` section, without the keys that a plug-in adds."""
        known = {key.name for key in fields(cls)}
        return cls(**{key: value for key, value in section.items() if key in known})
