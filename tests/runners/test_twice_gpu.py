"""The same run twice on a GPU, in two processes: equal weights, bit for bit, as docs/reproducible.md says."""

import pytest
import torch
from train_twice import train_twice, write_data

from minigpt4.__main__ import main
from minigpt4.cli.compare import weights_digest

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
EPOCHS = ["run.max_epoch=2", "run.iters_per_epoch=40"]
SETTINGS = {
    "the default": [],
    "padded": ["run.packed=False"],
    "not compiled": ["run.compile=False"],
    "padded, not compiled": ["run.packed=False", "run.compile=False"],
    "fp8": ["run.fp8=True"],
    "float16": ["run.amp_dtype=fp16"],
    "float32": ["run.amp=False"],
    "8 bit": ["model.load_in=8bit"],
    "8-bit weights": ["model.load_in=8bit_weights"],
    "4 bit": ["model.load_in=4bit"],
    "LoRA": ["model.lora={r: 8}"],
    "accumulated and clipped": ["run.accum_grad_iters=2", "run.grad_clip=0.5"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_run_twice(tmp_path, data, setting, capsys):
    runs = train_twice(tmp_path, [*data, *EPOCHS, *SETTINGS[setting]])
    assert main(["compare", *map(str, runs)]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("setting", ["the default", "LoRA"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_trains_the_weights_of_one_that_went_on(tmp_path, data, setting, num_workers):
    """With several prompts, of which one is drawn for each batch."""
    more = [f"run.num_workers={num_workers}", "model.prompt_path=prompts/alignment.txt"]
    options = [*data, *EPOCHS, *SETTINGS[setting], *more]
    whole, _ = train_twice(tmp_path, options)
    path = whole / "checkpoint_0.pth"
    resumed = train_twice(tmp_path / "resumed", [*options, f"run.resume_ckpt_path={path}"])
    digests = {weights_digest(each / "checkpoint_1.pth") for each in (whole, *resumed)}
    assert len(digests) == 1
