"""Paths, sizes and helpers that several test files use."""

import functools
import json
import os
import random
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# PYTHONPATH of subprocesses: this checkout first, then the present value.
PYTHONPATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
GOLDEN = ROOT / "tests" / "golden"
VIT = {"patch_size": 14, "embed_dim": 32, "depth": 3, "num_heads": 4, "mlp_ratio": 4.3637}
QFORMER = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
# Sizes of the files that `make-random-weights --size small` writes, as keys of `model:`.
SMALL_SIZES = {
    "vit_model": {"embed_dim": 64, "depth": 2, "num_heads": 4, "patch_size": 14, "mlp_ratio": 4.0},
    "qformer": {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "cross_attention_freq": 2,
    },
}


def free_port() -> int:
    """A port that no process listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@functools.cache
def interpret(script: str) -> dict:
    """Run a script with Triton's interpreter and return the JSON that it prints.

    Triton reads TRITON_INTERPRET when it is imported, so the script runs in a new process.
    """
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, f"tests/{script}"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
    )
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stderr:
        pytest.skip("Triton's interpreter does not work with this NumPy (for example, 3.6 with 2.4)")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def loss_and_gradient(model, samples: dict) -> tuple[dict, torch.Tensor]:
    """The output for a batch, in the model's computing type, and the gradient of the projection's weight."""
    model.zero_grad()
    with model.autocast(model.device):
        output = model(samples)
    output["loss"].backward()
    return output, model.llama_proj.weight.grad.clone()


def uncompiled(model) -> None:
    """Let everything that was set up compute as it is: no compiler, no graphs."""
    from minigpt4.fast.llama import FusedLlama
    from minigpt4.fast.vit import FusedViT
    from minigpt4.models.mini_gpt4 import cross_entropies

    step = model.step
    step.graphed_vision = step.loss_and_gradient = None
    step.cross_entropies = cross_entropies
    for part in model.modules():
        part._compiled_call_impl = None
    if step.fused_llama:
        step.fused_llama = FusedLlama(model.llama_model, compiled=False)
    if step.fused_vit:
        step.fused_vit = FusedViT(model.visual_encoder, compiled=False)


class Pictures(torch.utils.data.Dataset):
    """Pictures and captions held in memory."""

    def __init__(self, images, captions):
        self.images, self.captions = images, captions

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        return {"image": self.images[index], "text_input": self.captions[index]}


class Augmented(Pictures):
    """Pictures with random noise, some of which are left out."""

    left_out = 0

    def __getitem__(self, index):
        if index == 3:
            self.left_out += 1
        noise = random.random() + np.random.rand() + torch.rand(())
        return {"image": self.images[index] + 0.01 * noise, "text_input": self.captions[index]}

    def take_left_out(self):
        taken, self.left_out = self.left_out, 0
        return {("a test", "here"): taken} if taken else {}


def facts_of(runner):
    """All that a run ends with: weights, optimizer, its numbers without times, and log.txt without the config."""
    lines = [json.loads(line) for line in (runner.output_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "_seconds", "_per_second", "_mib")
    lines = [{k: v for k, v in line.items() if not k.endswith(timed)} for line in lines]
    for line in lines:
        line["samples"] = int(line.get("samples", "0")[:12], 16)  # torch.testing compares no texts
    weights = {name: p.detach() for name, p in runner._trainable().items()}
    return weights, runner.optimizer.state_dict()["state"], sorted(lines, key=str), random.random()


class FixedBatches:
    """A stand-in for the loader: the samples of the golden run, in its order."""

    def __init__(self, images, captions, indices):
        self.images, self.captions, self.indices = images, captions, indices

    def epoch(self, epoch, num_batches, first=0):
        for row in self.indices[epoch * num_batches + first : (epoch + 1) * num_batches]:
            yield {"image": self.images[row], "text_input": [self.captions[i] for i in row]}

    def use_next(self):
        pass

    def state(self):
        return {"left_out": [], "restarts": []}

    def take_left_out(self):
        return Counter()

    def take_ids(self):
        return []

    def shares(self):
        return {}


def quantize_by_bitsandbytes(module, load_in: str, dtype) -> None:
    """Exchange the linear layers in place for bitsandbytes' own, in "8bit" or "4bit"."""
    import bitsandbytes as bnb
    from torch import nn

    for name, layer in module.named_children():
        if not isinstance(layer, nn.Linear):
            quantize_by_bitsandbytes(layer, load_in, dtype)
            continue
        shape, weight = (layer.in_features, layer.out_features), layer.weight.data
        if load_in == "8bit":
            quantized = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, device="meta")
            quantized.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        else:
            quantized = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
            how = {"quant_type": "nf4", "compress_statistics": False}
            quantized.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, **how)
        setattr(module, name, quantized.to(weight.device))
