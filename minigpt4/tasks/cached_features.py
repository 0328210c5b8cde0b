"""Checks that a cache of image features is the one that the config's own vision side would make."""

import hashlib
from collections.abc import Mapping

from omegaconf import OmegaConf

from minigpt4.common import facts
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.common.schema import MiniGPT4Config
from minigpt4.datasets.feature_cache import check_same, read_manifest
from minigpt4.models.vision import is_vision
from minigpt4.weights import checkpoint, locate


def made_by(cfg: Config, name: str) -> dict:
    """Everything that determines the features of dataset `name`: the vision side, and the eval image processor.

    Raises ConfigError if features cannot be cached: random weights, no processor.
    """
    processor = cfg.datasets_cfg[name].vis_processor.get("eval")
    if not processor:
        raise ConfigError(f"datasets.{name}.vis_processor.eval is not set; cached features are made with it.")
    return {"model": vision_identity(cfg.model_cfg), "vis_processor": OmegaConf.to_container(processor)}


def vision_identity(section: Mapping) -> dict:
    """The settings and weights in the `model:` section that determine the features of an image.

    Equal identities give equal features. Weights are compared by content (`weights.locate.identity`).
    Raises ConfigError for random weights.
    """
    cfg = MiniGPT4Config.from_section(section)
    sources = {"vit_weights": facts.vit_weights(cfg.vit_model, cfg.vit_weights), "q_former_model": cfg.q_former_model}
    for key, source in sources.items():
        if source is None:
            raise ConfigError(f"model.{key} is null: random weights make other features each time. Give a file.")
    return {
        "image_size": cfg.image_size,
        "vit_model": cfg.vit_model if isinstance(cfg.vit_model, str) else dict(cfg.vit_model),
        "num_query_token": cfg.num_query_token,
        "qformer": dict(cfg.qformer),
        **{key: locate.identity(source) for key, source in sources.items()},
        "ckpt": _trained_vision(cfg.ckpt),
    }


def check_cache(cfg: Config, name: str) -> None:
    """Raise ConfigError unless the cache that dataset `name` reads fits the rest of the config."""
    for key in ("freeze_vit", "freeze_qformer"):
        if not cfg.model_cfg.get(key, True):
            raise ConfigError(
                f"model.{key}=False does not go with datasets.{name}.build_info.features: cached features cannot be "
                f"trained. Set model.{key}=True, or train from pictures."
            )
    folder = facts.cached_features(cfg.datasets_cfg[name])
    message = (
        f"datasets.{name}.build_info.features={folder} was made by another vision side or processor. Run "
        "cache-features with this config, or change the config to what made the cache"
    )
    check_same(read_manifest(folder)["made_by"], made_by(cfg, name), message)


def _trained_vision(ckpt: str | None) -> str | None:
    """SHA-256 of the vision side's tensors in `model.ckpt`, names and values; None: the vision side was frozen."""
    trained = checkpoint.read_weights(checkpoint.resolve(ckpt)) if ckpt else {}
    names = [name for name in sorted(trained) if is_vision(name) and not checkpoint.TOLERATED.search(name)]
    digest = hashlib.sha256()
    for name in names:
        digest.update(name.encode() + trained[name].float().numpy().tobytes())
    return digest.hexdigest() if names else None
