"""What every model of the registry shares."""

from pathlib import Path

import torch
from torch import nn

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
    def from_config(cls, cfg) -> "BaseModel":
        """Build the model from the `model:` section."""
        raise NotImplementedError

    @classmethod
    def build(cls, cfg, device: torch.device, dtype: torch.dtype) -> "BaseModel":
        """What a run calls. A model that cares where and in which type its frozen parts lie overrides this."""
        return cls.from_config(cfg).to(device)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
