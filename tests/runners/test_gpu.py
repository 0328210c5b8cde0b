"""Tests that need a GPU: 16-bit training and the loss scaler."""

import random

import pytest
import torch
from helpers import QFORMER, VIT, Pictures

from minigpt4.common import dist_utils
from minigpt4.models import MiniGPT4
from minigpt4.tracking.metrics import read_metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def gpu_model(golden_weights, folder, dtype, **cfg):
    model = MiniGPT4.from_config(
        {
            "image_size": 28,
            "vit_model": VIT,
            "qformer": QFORMER,
            "num_query_token": 8,
            "vit_weights": None,
            "q_former_model": None,
            "llama_model": str(folder),
            **cfg,
        },
        "cuda",
        dtype,
    )
    own = model.state_dict()
    model.load_state_dict(
        {k: v for k, v in golden_weights.items() if k in own and not k.startswith("llama_model")}, False
    )
    return model


@pytest.mark.parametrize("amp_dtype", DTYPES)
def test_training_in_16_bit(golden_weights, golden_llm_folder, golden, make_runner, amp_dtype):
    cases, tensors = golden("train_forward")
    model = gpu_model(golden_weights, golden_llm_folder, DTYPES[amp_dtype])
    assert model.visual_encoder.blocks[0].attn.qkv.weight.dtype == DTYPES[amp_dtype]
    assert model.visual_encoder.blocks[0].attn.q_bias.dtype == torch.float32
    assert model.llama_proj.weight.dtype == torch.float32
    samples = {"image": tensors["stage1.image"].cuda(), "text_input": cases["forward_cases"]["stage1"]["text_input"]}
    loss = model(samples)["loss"].item()
    assert loss == pytest.approx(float(tensors["stage1.loss"]), rel=0.02)

    runner = make_runner(
        model, device="cuda", amp=True, amp_dtype=amp_dtype, iters_per_epoch=20, init_lr=0.02, min_lr=0.01, max_epoch=1
    )
    assert runner.dtype == DTYPES[amp_dtype]
    assert runner.scaler.is_enabled() == (amp_dtype == "fp16")
    runner.train()
    assert model(samples)["loss"].item() < loss - 0.5
    content = torch.load(runner.output_dir / "checkpoint_0.pth", weights_only=True)
    assert content["scaler"] is not None  # the first release resumes only with one
    assert content["model"]["llama_proj.weight"].dtype == torch.float32


@pytest.mark.parametrize("compiled", [False, True])
def test_evaluation_between_steps_changes_nothing(golden_weights, golden_llm_folder, make_runner, pool, compiled):
    """As far as two runs without evaluation are equal; with the prefetching thread, packed batches and CUDA graphs."""
    splits = {"train": Pictures(*pool), "val": Pictures(*pool)}
    settings = {
        "device": "cuda",
        "amp": True,
        "compile": compiled,
        "iters_per_epoch": 8,
        "max_epoch": 2,
        "init_lr": 0.02,
    }
    evaluated = {"valid_splits": "[val]", "eval_task": "caption", "eval_every_steps": 3, "eval_samples": 5}
    found = []
    for job, more in (("first", {}), ("second", {}), ("evaluated", evaluated)):
        random.seed(0), torch.manual_seed(0)
        model = gpu_model(golden_weights, golden_llm_folder, dist_utils.select_dtype(torch.device("cuda")))
        model.prompt_list = ["One <Img><ImageHere></Img>", "Another <Img><ImageHere></Img>"]
        runner = make_runner(model, splits, job, **settings, **more)
        runner.train()
        found.append((model.llama_proj.weight.detach().clone(), random.random()))
    steps = [line["step"] for line in read_metrics(runner.output_dir / "metrics.jsonl") if "val_CIDEr-D" in line]
    assert steps == [0, 3, 6, 8, 9, 12, 15, 16]
    (first, drawn), (second, _), (weight, drawn_after) = found
    assert drawn == drawn_after
    assert (weight - first).abs().max() <= (second - first).abs().max()


def test_auto_is_bf16_on_cards_that_have_it():
    device = dist_utils.select_device("cuda")
    expected = torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    assert dist_utils.select_dtype(device) == expected
    assert dist_utils.select_dtype(device, amp=False) == torch.float32


def test_full_precision_on_a_gpu_matches_golden(golden_weights, golden_llm_folder, golden):
    cases, tensors = golden("train_forward")
    case = cases["forward_cases"]["stage2"]
    model = gpu_model(golden_weights, golden_llm_folder, torch.float32, max_txt_len=160, end_sym="###")
    model.prompt_list = [case["prompt"]]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    output = model({"image": tensors["stage2.image"].cuda(), "text_input": case["text_input"]})
    output["loss"].backward()
    assert float(output["loss"]) == pytest.approx(float(tensors["stage2.loss"]), abs=1e-4)
    gradient = model.llama_proj.weight.grad.cpu()
    torch.testing.assert_close(gradient, tensors["stage2.grad.llama_proj.weight"], atol=1e-4, rtol=0)
