"""The base class of the models in the registry."""

import inspect
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import default_yaml


class BaseModel(nn.Module):
    """A model that is built from YAML.

    A subclass registers itself and implements `from_config`. Its `forward` takes `samples`, a batch of its datasets,
    and returns `{"loss": …}`. With a second entry `"num_labels"`, the loss is the mean over so many labels, and
    micro-batches and ranks are weighted by this number.
    """

    PRETRAINED_MODEL_CONFIG_DICT: dict[str, str] = {}
    """{model_type: default YAML}; paths are absolute or relative to the package."""

    config_class: type | None = None
    """Dataclass of the model's YAML keys. None: any key is accepted."""

    fingerprint: dict | None = None
    """Identifies the frozen language model (`weights.fingerprint`). Checkpoints record it."""

    @classmethod
    def default_config_path(cls, model_type: str) -> Path:
        """The default YAML of a model type. For an unknown type, raises a KeyError that lists the known ones."""
        return default_yaml(cls.PRETRAINED_MODEL_CONFIG_DICT, model_type, f"{cls.__name__} has no model_type")

    @classmethod
    def from_config(cls, cfg: Mapping) -> "BaseModel":
        """Build the model from the `model:` section.

        A model that chooses the device and dtype of its frozen parts itself has the parameters `device` and `dtype`,
        too.
        """
        raise NotImplementedError

    @classmethod
    def build(cls, cfg: Mapping, device: torch.device, dtype: torch.dtype) -> "BaseModel":
        """Build the model on `device` with `from_config` in either form."""
        if "dtype" in inspect.signature(cls.from_config).parameters:
            return cls.from_config(cfg, device=device, dtype=dtype)
        return cls.from_config(cfg).to(device)

    def accelerate(self, packed: bool, compiled: bool, fp8: bool = False) -> None:
        """Use faster training steps in 16 bit, equal up to rounding. This class has none.

        Raises ConfigError for fp8, instead of ignoring it.
        """
        if fp8:
            raise ConfigError(f"run.fp8=True: {type(self).__name__} has no layers in fp8. Set run.fp8=False.")

    def sanitize(self, samples: dict) -> dict:
        """Break up what the model would take for a part of the prompt in the texts of a batch. Here: nothing."""
        return samples

    def prepare(self, samples: dict) -> dict:
        """Do host work on a batch, such as tokenisation. A thread calls this while the batch before is computed."""
        return samples

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
