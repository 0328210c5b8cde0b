"""`arch: minigpt4`, the name of MiniGPT-4 in upstream's later code, for its YAML files and for harnesses."""

from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import OmegaConf

from minigpt4.common.config_files import load_yaml
from minigpt4.common.dist_utils import select_dtype
from minigpt4.common.registry import registry
from minigpt4.models.mini_gpt4 import MiniGPT4


@registry.register_model("minigpt4")
class LaterMiniGPT4(MiniGPT4):
    """`MiniGPT4`, built on the GPU `device_8bit` unless a device is given: upstream's callers name it nowhere else."""

    PRETRAINED_MODEL_CONFIG_DICT = {
        **MiniGPT4.PRETRAINED_MODEL_CONFIG_DICT,
        # The first name is that code's own; VLMEvalKit has the others.
        **dict.fromkeys(
            ("pretrain_vicuna0", "pretrain_vicuna_7b", "pretrain_vicuna_13b"), "configs/models/minigpt4.yaml"
        ),
    }

    @classmethod
    def default_config_path(cls, model_type: str) -> Path:
        if model_type == "pretrain_llama2":
            raise KeyError(
                "model.model_type='pretrain_llama2' is a model without a Q-Former, which is not here. To train a "
                "projection for Llama 2, write model_type: pretrain_vicuna0, template: llama2 and llama_model."
            )
        return super().default_config_path(model_type)

    @classmethod
    def from_config(
        cls, cfg: Mapping, device: str | torch.device | None = None, dtype: torch.dtype | None = None
    ) -> "LaterMiniGPT4":
        """As `MiniGPT4.from_config`. Without a device, the section is as it is in the caller's file."""
        if device is None:
            defaults = cls.default_config_path(cfg.get("model_type", cls.config_class.model_type))
            cfg = OmegaConf.merge(load_yaml(defaults).model, cfg)
            gpu = cfg.get("device_8bit")
            device = "cpu" if gpu is None or not torch.cuda.is_available() else f"cuda:{gpu}"
        device = torch.device(device)
        return super().from_config(cfg, device, dtype or select_dtype(device))
