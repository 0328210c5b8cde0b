"""Facts that both the loading code and doctor need, each in one place. torch is not imported here.

Among them: the sources of published weights, the newest checkpoint of a run's folder, how the language model is loaded,
whether the vision side is loaded, and the size of a micro-batch.
"""

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from minigpt4 import PACKAGE_ROOT
from minigpt4.common.errors import ConfigError
from minigpt4.common.model_schema import BLIP2_URL, VIT_KEYS, VIT_MODELS

# The place of a checkpoint at the end of its epoch.
END = float("inf")
# The place of an image's vectors in a text.
IMAGE_SLOT = "<ImageHere>"
# Separates the turns of a chat.
SEPARATOR = "###"
# Published weights of the vision encoders that `vit_model` names.
VIT_WEIGHTS = {
    "eva_clip_g": "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/eva_vit_g.pth",
    "eva_tiny": str(PACKAGE_ROOT / "assets" / "tiny" / "vision.safetensors"),
}
# Sizes of the published files, in KiB.
PUBLISHED_KIB = {VIT_WEIGHTS["eva_clip_g"]: 1_977_783, BLIP2_URL: 423_322}
# Most tokens of a micro-batch (a packed batch is cut into these), and on a large GPU with fp8.
MICRO_BATCH_TOKENS, LARGE_MICRO_BATCH_TOKENS = 1536, 3072
LARGE_GPU_BYTES = 64e9


def tokens_per_micro_batch(fp8: bool = False, gpu_bytes: float = 0) -> int:
    """Most tokens of a micro-batch, unless one sequence alone is longer. gpu_bytes: memory of the GPU.

    With fp8 on GPUs of 64 GB or more, micro-batches are larger: 2 % faster for 4.6 GB more memory at S1/64.
    """
    return LARGE_MICRO_BATCH_TOKENS if fp8 and gpu_bytes >= LARGE_GPU_BYTES else MICRO_BATCH_TOKENS


def load_in(load_in: str | None, low_resource: bool) -> str:
    """How the language model is loaded: `model.load_in`, or if that is not set, what `model.low_resource` implies."""
    return load_in or ("8bit" if low_resource else "16bit")


def place_of_checkpoint(path: Path) -> tuple[int, float] | None:
    """(epoch, micro-batches done in it, or END) of a run's own checkpoint; None: its name is none of these."""
    match = re.fullmatch(r"checkpoint_(\d+)(?:_(\d+))?\.pth", path.name)
    return (int(match[1]), int(match[2]) if match[2] else END) if match else None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, checkpoint_<epoch>.pth and checkpoint_<epoch>_<batch>.pth, newest first."""
    return sorted(filter(place_of_checkpoint, folder.iterdir()), key=place_of_checkpoint, reverse=True)


def cached_features(dataset_cfg: Mapping) -> str | None:
    """The folder of a dataset's cached image features; None: it is read from pictures."""
    return (dataset_cfg.get("build_info") or {}).get("features") or None


def loads_vision(model_cfg: Mapping, from_features: Collection[bool]) -> bool:
    """Whether encoder and Q-Former are loaded. Training from cached features alone does without them.

    from_features: for each dataset of the run, whether it is read from cached features.
    """
    return model_cfg.get("load_vision", True) and not (from_features and all(from_features))


def vit_sizes(vit_model: str | Mapping[str, float]) -> Mapping[str, float]:
    """The sizes, under VIT_KEYS, of an encoder that `model.vit_model` names or describes.

    Raises ConfigError for an unknown name, and for a mapping with missing or unknown sizes.
    """
    if isinstance(vit_model, str):
        if vit_model not in VIT_MODELS:
            known = f"{', '.join(VIT_MODELS)}, or a mapping of {', '.join(VIT_KEYS)}"
            raise ConfigError(f"model.vit_model={vit_model!r} is not known. Use one of {known}.")
        return VIT_MODELS[vit_model]
    if set(vit_model) != set(VIT_KEYS):
        raise ConfigError(f"model.vit_model needs exactly the sizes {sorted(VIT_KEYS)}; it has {sorted(vit_model)}.")
    width, heads = vit_model["embed_dim"], vit_model["num_heads"]
    if width % heads:
        raise ConfigError(f"model.vit_model.embed_dim={width} is not a multiple of model.vit_model.num_heads={heads}.")
    return vit_model


def vit_weights(vit_model, weights: str | None) -> str | None:
    """Resolve `model.vit_weights`: "published" stands for the weights of the named encoder.

    Raises ConfigError if `vit_model` is a mapping and no weights are given.
    """
    if weights != "published":
        return weights
    if not isinstance(vit_model, str):
        raise ConfigError(
            "model.vit_weights is required when model.vit_model is a mapping: no weights are published for it. "
            "Give a path, or null for random weights."
        )
    return VIT_WEIGHTS[vit_model]


def offline() -> bool:
    """Whether nothing may be fetched: `--offline`, or HF_HUB_OFFLINE in the environment."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def go_offline() -> None:
    """Fetch nothing from now on. Call it before the libraries that fetch are imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def is_adapter(parameter: str) -> bool:
    """Whether a name is that of an adapter's parameter, as peft names them."""
    return ".lora_" in parameter


def is_url(value: str) -> bool:
    return "://" in value


def is_gguf(llama_model: str) -> bool:
    """Whether the value of `model.llama_model` names a .gguf file."""
    return llama_model.lower().endswith(".gguf")


def is_hub_id(value: str) -> bool:
    """Whether the value is `owner/name`. If there is a folder `owner`, it is a misspelt path instead."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", value) is not None and not Path(value.split("/")[0]).exists()
