"""A task builds datasets and model from a config, and computes the loss of a batch."""

import logging

import torch
from omegaconf import OmegaConf
from torch import nn

from minigpt4.common import dist_utils, facts
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.models.base_model import BaseModel
from minigpt4.models.fitting import log_doubts
from minigpt4.tasks.cached_features import check_cache


class BaseTask:
    """Builds datasets and model, and takes one training or validation step. Subclasses override what they change.

    `common.contracts.Task` describes when each method is called.
    """

    config_class: type | None = None
    """Dataclass of the `run:` section, a subclass of RunConfig, for a task with keys of its own."""

    @classmethod
    def setup_task(cls, cfg: Config) -> "BaseTask":
        """The task of a `Config`."""
        return cls()

    def build_datasets(self, cfg: Config) -> dict[str, dict]:
        """{dataset name: {split: dataset}} for each section of `datasets:`.

        Raises ConfigError if there is none, and for cached features that the model's own vision side would not make.
        """
        if not cfg.datasets_cfg:
            raise ConfigError("The config has no dataset. Add a section such as datasets: {cc_sbu_align: {...}}.")
        datasets = {}
        for name, section in cfg.datasets_cfg.items():
            builder = cfg.builder_class(name)(section)
            builder.name = name  # for messages, whatever name a plug-in gives itself
            builder.data_timeout_s = cfg.run_cfg.data_timeout_s
            if builder.from_features(section):
                check_cache(cfg, name)
            datasets[name] = builder.build_datasets()
        return datasets

    def build_model(self, cfg: Config) -> BaseModel:
        """The model of `model:` on the run's device, its frozen parts computing in the run's type."""
        device = dist_utils.select_device(cfg.run_cfg.device)
        dtype = dist_utils.select_dtype(device, cfg.run_cfg.amp, cfg.run_cfg.amp_dtype)
        model_cfg = cfg.model_cfg
        # The builder decides: one of a plug-in may give the key `features` another meaning.
        cached = [cfg.builder_class(name).from_features(cfg.datasets_cfg[name]) for name in cfg.datasets_cfg]
        if model_cfg.get("load_vision") and not facts.loads_vision(model_cfg, cached):
            logging.info("Every dataset is cached features: encoder and Q-Former are not loaded.")
            model_cfg = OmegaConf.merge(model_cfg, {"load_vision": False})
        model = registry.get_model_class(model_cfg.arch).build(model_cfg, device, dtype)
        log_doubts(model_cfg, model)
        return model

    def train_step(self, model: nn.Module, samples: dict) -> dict | torch.Tensor:
        """The loss of a batch, with gradient: a tensor, or {"loss": …}, weighted by "num_labels" if that is there."""
        return model(samples)

    def valid_step(self, model: nn.Module, samples: dict) -> dict | torch.Tensor:
        """The loss of a batch, without gradient, in the same form."""
        return model(samples)

    def agg_metrics(self, loss: float) -> float:
        """The metric that decides on the best checkpoint; higher is better, and it may be negative."""
        return -loss
