"""What every model of the registry shares."""

import inspect
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import did_you_mean, registry


class BaseModel(nn.Module):
    """A model that is built from YAML.

    A subclass registers itself, implements `from_config`, and takes `samples`, a batch of its datasets, to
    `{"loss": …}`. With `"num_labels"` beside it, the loss counts as the mean over so many labels, and micro-batches and
    ranks are weighted by it.
    """

    PRETRAINED_MODEL_CONFIG_DICT: dict[str, str] = {}
    """model_type -> default YAML, relative to the package (or absolute)."""

    config_class: type | None = None
    """Dataclass of the model's YAML keys; None: any key is accepted."""

    fingerprint: dict | None = None
    """What tells its frozen language model from others (`common.fingerprint`); checkpoints record it."""

    @classmethod
    def default_config_path(cls, model_type: str) -> Path:
        """The default YAML of a model type. Raises KeyError that lists the known types."""
        known = cls.PRETRAINED_MODEL_CONFIG_DICT
        if model_type not in known:
            raise KeyError(
                f"model_type={model_type!r} is not known for {cls.__name__}.{did_you_mean(model_type, known)} "
                f"Known: {', '.join(known)}."
            )
        return Path(registry.get_path("library_root")) / known[model_type]

    @classmethod
    def from_config(cls, cfg: Mapping) -> "BaseModel":
        """Build the model from the `model:` section.

        A model that cares where its frozen parts lie, and in which type, takes `device` and `dtype` beside `cfg`.
        """
        raise NotImplementedError

    @classmethod
    def build(cls, cfg: Mapping, device: torch.device, dtype: torch.dtype) -> "BaseModel":
        """The model on `device`, by `from_config` in either form."""
        if "dtype" in inspect.signature(cls.from_config).parameters:
            return cls.from_config(cfg, device=device, dtype=dtype)
        return cls.from_config(cfg).to(device)

    def accelerate(self, packed: bool, compiled: bool, fp8: bool = False) -> None:
        """Set up faster training steps in 16 bit that compute the same to rounding. This class has none.

        Raises ConfigError for fp8, which would be ignored otherwise.
        """
        if fp8:
            raise ConfigError(f"run.fp8=True: {type(self).__name__} has no layers in fp8. Set run.fp8=False.")

    def prepare(self, samples: dict) -> dict:
        """What can be done with a batch on the host before its turn comes, on another thread."""
        return samples

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
