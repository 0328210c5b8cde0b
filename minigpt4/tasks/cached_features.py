"""Whether a cache of image features is what the config's own vision side would make."""

from omegaconf import OmegaConf

from minigpt4.common.errors import ConfigError
from minigpt4.datasets.feature_cache import check_same, read_manifest
from minigpt4.models import vision


def made_by(cfg, name: str) -> dict:
    """What decides on the features of dataset `name`: the vision side, and the processor that sees the whole picture.

    Raises ConfigError where features cannot be cached: random weights, no processor.
    """
    processor = cfg.datasets_cfg[name].vis_processor.get("eval")
    if not processor:
        raise ConfigError(f"datasets.{name}.vis_processor.eval is not set; cached features are made with it.")
    return {"model": vision.identity(cfg.model_cfg), "vis_processor": OmegaConf.to_container(processor)}


def check_cache(cfg, name: str) -> None:
    """Raise ConfigError unless the cache that dataset `name` is to be read from fits the rest of the config."""
    for key in ("freeze_vit", "freeze_qformer"):
        if not cfg.model_cfg.get(key, True):
            raise ConfigError(
                f"model.{key}=False does not go with datasets.{name}.build_info.features: what is cached cannot learn. "
                f"Set model.{key}=True, or train from pictures."
            )
    folder = cfg.datasets_cfg[name].build_info.features
    message = (
        f"datasets.{name}.build_info.features={folder} was made by another vision side or processor. Run "
        "cache-features with this config, or change the config to what made the cache"
    )
    check_same(read_manifest(folder)["made_by"], made_by(cfg, name), message)
