"""Shared fixtures: the golden data, and the tiny random model it was made with as a Hugging Face folder."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from helpers import GOLDEN, QFORMER, VIT
from safetensors.torch import load_file


@pytest.fixture(scope="session")
def golden():
    """Reader of the golden files: golden("vision") gives (json content, tensors)."""

    def read(name: str):
        described, tensors = GOLDEN / f"{name}.json", GOLDEN / f"{name}.safetensors"
        content = json.loads(described.read_text(encoding="utf-8")) if described.exists() else None
        return content, load_file(tensors) if tensors.exists() else None

    return read


@pytest.fixture(scope="session")
def golden_weights():
    return load_file(GOLDEN / "tiny_weights.safetensors")


@pytest.fixture(scope="session")
def golden_llm_folder(tmp_path_factory, golden_weights) -> Path:
    """The language model of the golden data as a Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = json.loads((GOLDEN / "tiny_config.json").read_text())["llama"]
    llm = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in sizes.items() if k != "rope_theta"}))
    prefix = "llama_model."
    weights = {k.removeprefix(prefix): v for k, v in golden_weights.items() if k.startswith(prefix)}
    llm.load_state_dict({k: v for k, v in weights.items() if not k.endswith("inv_freq")})
    folder = tmp_path_factory.mktemp("llm")
    llm.save_pretrained(folder)
    for file in (GOLDEN / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def golden_model_keys(golden_llm_folder) -> dict:
    """The YAML keys of `model:` that give a model of the golden sizes, its vision side random."""
    return {
        "image_size": 28,
        "vit_model": VIT,
        "vit_weights": None,
        "q_former_model": None,
        "qformer": QFORMER,
        "num_query_token": 8,
        "llama_model": str(golden_llm_folder),
    }


@pytest.fixture(scope="session")
def build_golden_model(golden_model_keys, golden_weights):
    """Builder of the golden model: keyword arguments are YAML keys of `model:`, or its `device` and `dtype`."""
    from minigpt4.models import MiniGPT4

    def build(device: str = "cpu", dtype: torch.dtype = torch.float32, **cfg) -> MiniGPT4:
        model = MiniGPT4.from_config(golden_model_keys | cfg, device, dtype)
        weights = dict(golden_weights)
        if cfg.get("image_size") == 56:
            weights |= load_file(GOLDEN / "tiny_weights_56_vision.safetensors")
        own = model.state_dict()
        model.load_state_dict({k: v for k, v in weights.items() if k in own})
        return model

    return build


@pytest.fixture(autouse=True)
def _alone():
    """One thread, as the golden numbers were made on; and what train.py does to logging ends with the test."""
    torch.set_num_threads(1)
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture
def golden_config(golden_model_keys, tmp_path) -> Path:
    """A YAML file for a model of the golden sizes, its vision side random."""
    from omegaconf import OmegaConf

    model = {"arch": "mini_gpt4", **golden_model_keys}
    eval_processor = {"vis_processor": {"eval": {"name": "blip2_image_eval", "image_size": 28}}}
    path = tmp_path / "golden.yaml"
    OmegaConf.save({"model": model, "preprocess": eval_processor, "run": {"task": "image_text_pretrain"}}, path)
    return path
