"""The tiny default with its own weights, and drawings that it can name; memory that shows what a kernel leaves out."""

from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT
from PIL import Image

from minigpt4.cli.drawings import save_examples
from minigpt4.common.config import Config
from minigpt4.models import MiniGPT4
from minigpt4.processors import Blip2ImageEvalProcessor


@pytest.fixture
def poisoned_memory():
    """New memory holds NaN: what the kernels leave out would show."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def load_tiny():
    """Builder of the tiny default, in bfloat16 and after stage 1 unless told otherwise."""

    def load(device="cpu", ckpt="${package:assets/tiny/stage1.safetensors}") -> MiniGPT4:
        options = [f"model.ckpt={ckpt}", "model.prompt_path=null"]
        cfg = Config(SimpleNamespace(cfg_path=ROOT / "eval_configs/minigpt4_tiny_eval.yaml", options=options))
        torch.manual_seed(0)
        model = MiniGPT4.from_config(cfg.model_cfg, device, torch.bfloat16)
        model.end_sym = "\n"
        return model

    return load


@pytest.fixture(scope="session")
def drawings(tmp_path_factory):
    """A batch of four drawings with their names."""
    processor = Blip2ImageEvalProcessor(64)
    files = save_examples(tmp_path_factory.mktemp("drawings"), emoji=True)
    images = torch.stack([processor(Image.open(file).convert("RGB")) for file in files])
    return {"image": images, "text_input": ["cat face", "red apple", "sailboat", "automobile"]}
