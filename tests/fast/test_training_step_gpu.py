"""Accelerated training steps on a GPU give losses and gradients of plain ones. Skipped, and said so, without one."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, quantize_by_bitsandbytes
from torch import nn

from minigpt4.common import compat
from minigpt4.fast.cuda_graphs import GraphedFunction
from minigpt4.fast.vit import FusedViT, linear_gelu, run_block, supports_fused_vit
from minigpt4.models.eva_vit import create_vit
from minigpt4.models.loading import cast_matrices
from minigpt4.quantization import bitsandbytes as low_bit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TEXTS = (["a dog", "two cats on a mat, asleep"], ["one", "a"], ["a much longer text, with more words in it"] * 2)


def steps(model, order):
    """Losses and gradients of the projection, one after the other; batches differ in length."""
    model.prompt_list = ["###Human: <Img><ImageHere></Img> What is it? ###Assistant: "]
    model.max_txt_len = 200
    results = []
    for number in order:
        torch.manual_seed(number)
        images = torch.randn(2, 3, 28, 28, device="cuda")
        model.zero_grad()
        loss = model({"image": images, "text_input": [text * 9 for text in TEXTS[number]]})["loss"]
        loss.backward()
        results.append((loss.item(), model.llama_proj.weight.grad.clone()))
    return results


@pytest.mark.parametrize("recomputed", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_accelerated_equals_plain(build_golden_model, caplog, dtype, recomputed):
    caplog.set_level("INFO")
    order = (0, 1, 2, 0, 1, 2, 0, 0, 1)  # eager, captured, replayed
    exact = steps(build_golden_model("cuda"), order)
    plain = steps(build_golden_model("cuda", dtype), order)
    model = build_golden_model("cuda", dtype, llm_grad_checkpoint=recomputed)
    model.accelerate(packed=True, compiled=True)
    assert model.step.packed
    assert bool(model.step.fused_llama) == (not recomputed)
    accelerated = steps(model, order)
    for (loss, gradient), usual, ours in zip(exact, plain, accelerated, strict=True):
        usual_error, error = ((other - gradient).norm() / gradient.norm() for _, other in (usual, ours))
        assert error < 1.5 * usual_error + 0.01  # no further from float32 than a plain step in 16 bit is
        assert ours[0] == pytest.approx(loss, rel=0.01)
    assert ("Recording a CUDA graph of the language model" in caplog.text) == (dtype == torch.bfloat16)
    assert accelerated[6][0] == accelerated[7][0]
    assert torch.equal(accelerated[6][1], accelerated[7][1])


@pytest.mark.parametrize("recomputed", [0, 1])
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_low_bit_layers_accelerated(build_golden_model, caplog, load_in, recomputed):
    """Compiled, captured and replayed, they are no further from float32 than bitsandbytes' own layers."""
    pytest.importorskip("bitsandbytes")
    caplog.set_level("INFO")

    def low_bit_model(**cfg):
        model = build_golden_model("cuda", torch.bfloat16, **cfg)
        quantize_by_bitsandbytes(model.llama_model.model, load_in, torch.bfloat16)
        return model

    order, exact, plain = (0, 1, 2, 0, 1, 2, 0, 0), build_golden_model("cuda"), low_bit_model()
    model = low_bit_model(llm_grad_checkpoint=recomputed)
    low_bit.replace_bitsandbytes_layers(model.llama_model)
    for name, part in model.llama_model.named_modules():
        if isinstance(part, low_bit.LowBitLinear):  # the weights that it stands for
            one = torch.eye(part.in_features, device="cuda")
            layer = exact.llama_model.get_submodule(compat.name_in_state_dict(name))
            layer.weight.data = low_bit.low_bit_matmul(one, part.weight, part.scale, False).t()
    model.accelerate(packed=True, compiled=True)
    assert bool(model.step.fused_llama) == (not recomputed)
    truth, usual, ours = steps(exact, order), steps(plain, order), steps(model, order)
    for (loss, gradient), (_, other), (own_loss, own) in zip(truth, usual, ours, strict=True):
        usual_error, error = ((found - gradient).norm() / gradient.norm() for found in (other, own))
        assert error < 1.5 * usual_error + 0.01
        assert own_loss == pytest.approx(loss, rel=0.01)
    assert "Recording a CUDA graph of the language model" in caplog.text
    assert torch.equal(ours[6][1], ours[7][1])


def test_garbage_pools_while_another_is_in_use():
    """In a process of its own, which torch 2.11 would abort."""
    program = """
import gc, torch
from minigpt4.fast.cuda_graphs import GraphedFunction

def function(collect):
    made = GraphedFunction(lambda x: (x * 2, gc.collect() if collect else None)[:1], "double")
    made.itself = made
    return made

x = torch.ones(4, device="cuda")
for number in range(20):
    old = function(False)
    for _ in range(3):
        old(x)
    old.graphs.clear()
    new = function(True)
    del old
    for _ in range(3):
        assert float(new(x)[0][0]) == 2
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120, cwd=ROOT)


def test_garbage_pools_after_a_failed_capture():
    """The failure is an ordinary error, and no later garbage aborts the process."""
    program = """
import gc, torch
from minigpt4.fast.cuda_graphs import GraphedFunction

x = torch.ones(4, device="cuda")
old = GraphedFunction(lambda x: (x * 2,), "old")
old.itself = old
for _ in range(3):
    old(x)
failing = GraphedFunction(lambda x: (x * float(x.sum()),), "failing")
failing(x)
try:
    failing(x)
except RuntimeError as error:
    print("failed as it must:", type(error).__name__)
old.graphs.clear()
del old
gc.collect()
print("alive")
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert run.stdout.split()[0] == "failed" and run.stdout.split()[-1] == "alive", run.stderr[-2000:]


def test_without_gradients_while_training(build_golden_model):
    """A validation pass between steps, with and without inference mode, leaves the next step as it was."""
    model = build_golden_model("cuda", torch.bfloat16)
    model.accelerate(packed=True, compiled=True)
    expected = steps(model, (0, 0, 0))[-1]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.manual_seed(0)
            model({"image": torch.randn(2, 3, 28, 28, device="cuda"), "text_input": ["a", "b"]})
        again = steps(model, (0,))[0]
        assert again[0] == expected[0]
        assert torch.equal(again[1], expected[1])


def test_graphs_share_memory_with_the_eager_calls():
    """Each pass keeps 16 tensors of 64 MiB; the graph's own would be 1 GiB more."""

    def waves(x):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = x
            for _ in range(16):
                y = y.sin()
            return torch.autograd.grad(y.sum(), x)

    torch.cuda.empty_cache()
    function, x = GraphedFunction(waves, "waves"), torch.randn(2**24, device="cuda")
    (expected,), peaks = waves(x), []
    for _ in range(4):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        assert torch.equal(function(x)[0], expected)
        peaks.append(torch.cuda.max_memory_reserved() / 2**20)
    assert len(function.graphs) == 1
    assert peaks[0] > 1000
    assert max(peaks) < peaks[0] + 500


def test_several_micro_batches_equal_one(build_golden_model):
    """Several micro-batches give the loss and gradient of a single one, to rounding; eager, captured and replayed."""
    order, results = (0, 1, 2, 0, 1, 2, 0, 1, 2), []
    for rows in (1024, 128):
        model = build_golden_model("cuda", torch.bfloat16)
        model.accelerate(packed=True, compiled=True)
        model.step.max_tokens = rows
        results.append(steps(model, order))
    for (loss, gradient), (in_micro_batches, gradient_in_micro_batches) in zip(*results, strict=True):
        assert in_micro_batches == pytest.approx(loss, rel=2e-3)
        assert (gradient_in_micro_batches - gradient).norm() < 0.01 * gradient.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fused_encoder(dtype):
    """Compiled once for all blocks, it is no further from float32 than timm's own forward pass in 16 bit is."""
    torch.manual_seed(0)
    vit = create_vit("eva_tiny", 64).cuda().requires_grad_(False).eval()
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.1)
    images = torch.randn(4, 3, 64, 64, device="cuda")
    exact = vit(images)
    cast_matrices(vit, dtype)
    assert supports_fused_vit(vit)
    torch._dynamo.reset()
    compiled, blocks = torch.compile(run_block, fullgraph=True), []
    fused = FusedViT(vit, compiled=False)

    def compiled_once(block, x, delta):
        with torch.compiler.set_stance("fail_on_recompile" if blocks else "default"):
            blocks.append(block)
            return compiled(block, x, delta)

    fused.block_fn = compiled_once

    with torch.autocast("cuda", dtype, cache_enabled=False):
        plain, ours = vit(images), fused(images)
    assert blocks == [*vit.blocks]
    assert plain.dtype == ours.dtype == torch.float32
    usual_error, error = ((other - exact).norm() / exact.norm() for other in (plain, ours))
    assert error < 1.1 * usual_error


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_gelu(dtype, compiled):
    """At the encoder's own sizes: in bfloat16 nearer to the exact values than two steps, in float16 about as near."""
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(*shape, device="cuda").to(dtype) for shape in ((3, 257, 1408), (6144, 1408), (6144,))
    )
    weight /= 1408**0.5
    exact = F.gelu(F.linear(x.double(), weight.double(), bias.double()))
    call = torch.compile(linear_gelu, fullgraph=True) if compiled else linear_gelu
    ours, usual = call(x, weight, bias), F.gelu(F.linear(x, weight, bias))
    assert ours.shape == exact.shape and ours.dtype == dtype
    error, usual_error = (other.double().sub_(exact).abs_() for other in (ours, usual))
    assert error.mean() < (1.0 if dtype == torch.bfloat16 else 1.3) * usual_error.mean()
    rounding = torch.finfo(dtype).eps / 2
    assert (error < 6e-4 + 1.1 * rounding * exact.abs()).all()  # GELU's tanh form, and one rounding


@pytest.mark.parametrize("shape", [(40,), (1, 40), (5, 40), (2, 5, 40), (1000, 40)])
def test_linear_gelu_of_other_sizes(shape):
    """Of one row too, and of a width that is no multiple of 8."""
    torch.manual_seed(0)
    weight, bias = torch.randn(139, 40, device="cuda").bfloat16() / 6, torch.randn(139, device="cuda").bfloat16()
    x = torch.randn(*shape, device="cuda").bfloat16()
    torch.testing.assert_close(linear_gelu(x, weight, bias), F.gelu(F.linear(x, weight, bias)), rtol=0.02, atol=0.02)
    torch.library.opcheck(linear_gelu, (x, weight, bias))
