"""Layers of bitsandbytes as training steps run them: the same weights, products of our own."""

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, loss_and_gradient
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from minigpt4.common import compat
from minigpt4.fast import llama as fast_llama
from minigpt4.fast.cuda_graphs import GraphedFunction
from minigpt4.fast.fused_linear import FusedSlice, fuse_projections
from minigpt4.models.llm import load_llm, recompute_layers
from minigpt4.models.loading import parameter_count
from minigpt4.quantization import bitsandbytes as low_bit

bnb = pytest.importorskip("bitsandbytes")
TINY = str(ROOT / "minigpt4/assets/tiny/llama")
CPU = torch.device("cpu")


def layer(load_in: str, inputs=128, outputs=64, bias=False, called=False, **how):
    torch.manual_seed(0)
    weight = torch.randn(outputs, inputs)
    if load_in == "8bit":
        made = bnb.nn.Linear8bitLt(inputs, outputs, bias, has_fp16_weights=False, threshold=6.0)
        made.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        how = {"quant_type": "nf4", "compress_statistics": False} | how
        made = bnb.nn.Linear4bit(inputs, outputs, bias, compute_dtype=torch.float32, **how)
        made.weight = bnb.nn.Params4bit(weight, requires_grad=False, **how)
    made = made.to("cpu").requires_grad_(False).eval()
    made.support_avx512bf16_for_cpu = False
    if called:
        made(torch.randn(1, inputs))
    return made


def decoded(made) -> torch.Tensor:
    """The weight that a layer of bitsandbytes stands for."""
    if isinstance(made, bnb.nn.Linear8bitLt):
        of = made.weight if made.state.CB is None else made.state
        return of.CB.float() * of.SCB.unsqueeze(1) / 127
    return bnb.functional.dequantize_4bit(made.weight.data, made.weight.quant_state).float()


def converted(made) -> low_bit.LowBitLinear:
    parent = nn.ModuleList([made])
    assert low_bit.replace_bitsandbytes_layers(parent) == 1 and not low_bit.has_bitsandbytes_layers(parent)
    return parent[0]


def output_and_gradient(made, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = made(x)
    return [y.detach(), *torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).sin()).sum(), x)]


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_a_layer_multiplies_by_the_weights_that_it_had(load_in, bias, called):
    """Before its first call and after it, when 8-bit weights lie elsewhere."""
    made, x = layer(load_in, bias=bias, called=called), torch.randn(2, 5, 128)
    expected = nn.Linear(128, 64, bias)
    expected.weight.data, expected.bias = decoded(made), made.bias
    made = converted(made)
    for ours, usual in zip(output_and_gradient(made, x), output_and_gradient(expected, x), strict=True):
        torch.testing.assert_close(ours, usual, rtol=1e-4, atol=1e-4)
    assert parameter_count(made.weight) == 128 * 64
    assert not made.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_a_product_is_in_the_type_of_what_it_is_given(load_in, dtype):
    made, x = layer(load_in), torch.randn(3, 128)
    weight, made = decoded(made), converted(made)
    y = low_bit.low_bit_matmul(x.to(dtype), made.weight, made.scale, False)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), F.linear(x, weight), rtol=0.02, atol=0.2 if dtype != torch.float32 else 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype == torch.bfloat16
    for sample in ((x, False), (torch.randn(3, 64), True)):
        torch.library.opcheck(low_bit.low_bit_matmul, (sample[0], made.weight.data, made.scale, sample[1]))


def llms(load_in: str, monkeypatch) -> list:
    """The tiny default's language model in 16 bit (float32 on a CPU), with bitsandbytes' layers, and with ours."""
    made = [load_llm(TINY, CPU, torch.float32, how) for how in ("16bit", load_in)]
    monkeypatch.setattr(low_bit, "replace_bitsandbytes_layers", lambda module: 0)
    made.insert(1, load_llm(TINY, CPU, torch.float32, load_in))
    assert [low_bit.has_bitsandbytes_layers(llm) for llm in made] == [False, True, False]
    for part in made[1].modules():  # bitsandbytes repacks them otherwise, and gives wrong gradients (0.50)
        part.support_avx512bf16_for_cpu = False
    return made


@pytest.mark.parametrize("load_in", ["16bit", "8bit_weights"])
def test_a_folder_in_4_bit_is_converted_whatever_load_in_is(load_in, tmp_path):
    """bitsandbytes' own layers can neither be compiled nor trusted with gradients on every CPU."""
    saved = AutoModelForCausalLM.from_pretrained(
        TINY, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), device_map=CPU
    )
    saved.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path)
    llm = load_llm(str(tmp_path), CPU, torch.float32, load_in)
    assert not low_bit.has_bitsandbytes_layers(llm)
    assert any(isinstance(part, low_bit.LowBitLinear) for part in llm.modules())


def logits_and_gradient(llm, embeds) -> list[torch.Tensor]:
    embeds = embeds.clone().requires_grad_()
    logits = llm(inputs_embeds=embeds, use_cache=False).logits
    return [logits.detach(), *torch.autograd.grad(logits.square().mean(), embeds)]


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_a_converted_llama_computes_what_bitsandbytes_does(load_in, monkeypatch):
    """In 4 bit the same results; in 8 bit results closer to full precision, since activations are not rounded."""
    full, usual, ours = (
        logits_and_gradient(llm, torch.randn(1, 40, llm.config.hidden_size, generator=torch.Generator().manual_seed(1)))
        for llm in llms(load_in, monkeypatch)
    )
    for exact, theirs, own in zip(full, usual, ours, strict=True):
        if load_in == "4bit":
            assert (own - theirs).norm() < 1e-5 * theirs.norm()
        else:
            assert (own - exact).norm() < 0.9 * (theirs - exact).norm()


@pytest.mark.parametrize("load_in", ["4bit", "8bit", "8bit_weights"])
def test_groups_are_joint_and_nothing_is_held_twice(load_in):
    llm = load_llm(TINY, CPU, torch.float32, load_in)
    count = sum(map(parameter_count, llm.parameters()))
    embeds = torch.randn(1, 12, llm.config.hidden_size)
    expected = logits_and_gradient(llm, embeds)
    assert fuse_projections(llm) == 2 * llm.config.num_hidden_layers
    assert fast_llama.supports_fused_llama(llm)
    for ours, usual in zip(logits_and_gradient(llm, embeds), expected, strict=True):
        torch.testing.assert_close(ours, usual, rtol=1e-4, atol=1e-5)
    attention = llm.model.layers[0].self_attn
    slices = attention.q_proj, attention.k_proj, attention.v_proj
    joint = attention.q_proj.fused.joint
    assert type(joint) is low_bit.LowBitLinear and all(type(part) is FusedSlice for part in slices)
    start = joint.weight.untyped_storage().data_ptr()
    assert all(part.weight.untyped_storage().data_ptr() == start for part in slices)
    assert not any("scale" in dict(part.named_buffers()) for part in slices)
    assert sum(map(parameter_count, llm.parameters())) == count


@pytest.mark.parametrize("recomputed", [0, 3])
@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_layers_compile_as_a_whole(load_in, recomputed):
    """The product is one op to the compiler, in both directions, also where a layer recomputes."""
    llm = load_llm(TINY, CPU, torch.float32, load_in)
    embeds = torch.randn(1, 12, llm.config.hidden_size)
    expected = logits_and_gradient(llm, embeds)
    fuse_projections(llm)
    recompute_layers(llm, recomputed)
    torch._dynamo.reset()
    for each in llm.model.layers:
        compat.without_recomputation(each).compile(backend="aot_eager", fullgraph=True)
    results = logits_and_gradient(llm, embeds)
    for ours, usual in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, usual, rtol=1e-3, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_a_fused_llama_in_the_whole_model(load_in, load_tiny, drawings):
    """A packed, fused step gives loss and gradient of a plain one to rounding."""
    results = []
    for fused in (False, True):
        model = load_tiny()
        model.llama_model = load_llm(TINY, CPU, torch.bfloat16, load_in)
        if fused:
            assert fuse_projections(model.llama_model)
            model.accelerate(packed=True, compiled=False)
            model.step.fused_llama = fast_llama.FusedLlama(model.llama_model, compiled=False)
        results.append(loss_and_gradient(model, drawings))
    (usual, usual_gradient), (ours, gradient) = results
    assert ours["loss"].item() == pytest.approx(usual["loss"].item(), rel=0.02)
    assert torch.cosine_similarity(gradient.flatten(), usual_gradient.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("load_in", ["4bit", "8bit", "8bit_weights"])
def test_a_run_fuses_them(load_in, load_tiny):
    """As far as a CPU can show; test_training_step_gpu.py takes steps."""
    model = load_tiny()
    model.llama_model = load_llm(TINY, CPU, torch.bfloat16, load_in)
    model.accelerate(packed=True, compiled=True)
    assert not model.step.quantized and model.step.packed
    assert isinstance(model.step.fused_llama, fast_llama.FusedLlama)
    assert isinstance(model.step.loss_and_gradient, GraphedFunction)


def test_without_triton_torch_dequantises_8_bit_weights(monkeypatch):
    """And on GPUs that it does not run on."""
    device = torch.device("cuda", 0)
    low_bit._kernel_runs.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not low_bit._kernel_runs(device)
    low_bit._kernel_runs.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(low_bit, "find_spec", lambda name: None)
    assert not low_bit._kernel_runs(device)
    low_bit._kernel_runs.cache_clear()


@pytest.mark.parametrize("load_in", ["4bit", "8bit"])
def test_a_bias_of_another_type_changes_no_type(load_in):
    made = converted(layer(load_in, bias=True))
    assert made(torch.randn(2, 128).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("how", [{"quant_type": "fp4"}, {"compress_statistics": True}])
def test_weights_quantised_in_another_way_stay(how):
    parent = nn.ModuleList([layer("4bit", **how)])
    assert low_bit.replace_bitsandbytes_layers(parent) == 0
    assert type(parent[0]) is bnb.nn.Linear4bit


def test_plain_layers_stay():
    parent = nn.ModuleList([nn.Linear(4, 4).requires_grad_(False)])
    assert low_bit.replace_bitsandbytes_layers(parent) == 0
    assert type(parent[0]) is nn.Linear
