"""Linear layers in fp8 against products of what they round to, in float32; where a run can have them, and where not.

torch's product of fp8 rows runs on a CPU in its newer releases only; elsewhere a stand-in computes it. Either way the
operands must be what a Hopper GPU asks for, which a CPU would not complain about.
"""

import functools
import importlib.util
import logging
from types import SimpleNamespace

import pytest
import torch
from helpers import loss_and_gradient, quantize_by_bitsandbytes
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt4.common.errors import ConfigError
from minigpt4.fast import llama as fast_llama
from minigpt4.fast import vit as fast_vit
from minigpt4.fast.attention import allow_packing
from minigpt4.fast.decoding.loop import cached_decoding
from minigpt4.fast.fused_linear import fuse_projections
from minigpt4.fast.packing.batch import pack
from minigpt4.fast.training_step import convert_to_fp8
from minigpt4.fast.vit import FusedViT, run_block, supports_fused_vit
from minigpt4.models.eva_vit import create_vit
from minigpt4.models.loading import cast_matrices
from minigpt4.quantization import fp8, fp8_rounding
from minigpt4.quantization.int8 import quantize_model
from minigpt4.weights import fingerprint


def stand_in(rows, columns, row_scale, column_scale, bias=None, out_dtype=None, use_fast_accum=False):
    y = (rows.float() * row_scale) @ (columns.float() * column_scale)
    return (y if bias is None else y + bias.float()).to(out_dtype)


def can_multiply() -> bool:
    one = torch.ones(16, 16).to(fp8_rounding.E4M3)
    try:
        torch._scaled_mm(one, one.t(), torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


PRODUCT = torch._scaled_mm if can_multiply() else stand_in


@pytest.fixture(autouse=True)
def products(monkeypatch):
    """The shapes of the products that were computed, [M,K,N]; their operands are what a Hopper GPU takes."""
    made = []

    def multiply(rows, columns, row_scale, column_scale, bias=None, out_dtype=None, use_fast_accum=False):
        assert rows.dtype == columns.dtype == torch.float8_e4m3fn and out_dtype == torch.bfloat16
        (m, k), n = rows.shape, columns.shape[1]
        assert rows.stride() == (k, 1) and columns.stride() == (1, k)
        assert k % 16 == 0 and n % 16 == 0
        for scale, shape in ((row_scale, (m, 1)), (column_scale, (1, n))):
            assert scale.dtype == torch.float32 and scale.shape == shape and scale.is_contiguous()
        assert bias is None or (bias.dtype == torch.bfloat16 and bias.is_contiguous())
        made.append([m, k, n])
        return PRODUCT(
            rows, columns, row_scale, column_scale, bias=bias, out_dtype=out_dtype, use_fast_accum=use_fast_accum
        )

    monkeypatch.setattr(torch, "_scaled_mm", multiply)
    return made


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Rows [M,K] to the nearest e4m3 numbers times their scale, by arithmetic of its own."""
    scale = x.float().abs().amax(dim=1, keepdim=True) / 448
    exponent = (x.float() / scale).abs().clamp(min=2.0**-6).log2().floor()
    step = scale * 2 ** (exponent - 3)  # three bits of mantissa; below 2^-6 the steps are equal
    return (x.float() / step).round() * step


def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias).bfloat16().requires_grad_(False)


def in_fp8(layer: nn.Linear, with_gradient: bool = True) -> fp8.Fp8Linear:
    return fp8.Fp8Linear(layer, with_gradient)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal but for rounding the result to bfloat16."""
    torch.testing.assert_close(a.float(), b, rtol=2**-8, atol=2**-8 * b.abs().max().item() / 16)


def test_rows_are_rounded_to_nearest():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-20, 20, 50).unsqueeze(1)
    values, scale = fp8_rounding.quantize_rows(x)
    assert values.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (50, 1)
    torch.testing.assert_close(values.float() * scale, rounded(x), rtol=1e-5, atol=0)
    assert torch.equal(values.float().abs().amax(dim=1), torch.full((50,), 448.0))


def test_rows_of_zeros_and_rows_that_are_not_finite():
    x = torch.tensor([[0.0, 0.0], [1e-45, 0.0], [float("inf"), 1.0], [1.0, float("nan")], [1.0, 2.0]])
    values, scale = fp8_rounding.quantize_rows(x)
    result = values.float() * scale
    assert torch.equal(result[0], torch.zeros(2))
    assert result[:2].isfinite().all() and torch.equal(result[4], x[4])
    assert not result[2].isfinite().all() and not result[3].isfinite().all()  # nothing is made up


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_output_and_gradient(bias, dtype, products):
    layer = linear(64, 48, bias)
    weight, layer = layer.weight, in_fp8(layer)
    x = torch.randn(2, 5, 64).to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == torch.bfloat16 and y.shape == (2, 5, 48)
    close(
        y.detach().flatten(0, 1), rounded(x.detach().flatten(0, 1)) @ rounded(weight).t() + (layer.bias if bias else 0)
    )
    gradient = torch.randn(2, 5, 48).bfloat16()
    y.backward(gradient)
    assert x.grad.dtype == dtype
    close(x.grad.flatten(0, 1), rounded(gradient.flatten(0, 1)) @ rounded(weight.t()).t())
    assert products == [[10, 64, 48], [10, 48, 64]]
    exact = nn.functional.linear(x.detach().float(), weight.float())
    assert (y.detach().float() - (layer.bias if bias else 0) - exact).norm() < 0.05 * exact.norm()


def test_a_gradient_that_lies_otherwise_in_memory():
    layer = in_fp8(linear(64, 48))
    x = torch.randn(64, 3).bfloat16().t().requires_grad_()
    layer(x).t().contiguous().sum().backward()
    layer(x).sum().backward()  # one number, expanded
    assert x.grad.shape == (3, 64)


def test_without_gradients_there_is_one_copy(products):
    layer = in_fp8(linear(64, 48, bias=True), with_gradient=False)
    with torch.inference_mode():
        assert layer(torch.randn(1, 64)).shape == (1, 48)
    assert [name for name, buffer in layer.named_buffers() if buffer is not None] == ["scale"]
    assert products == [[1, 64, 48]]


def test_inside_a_checkpoint():
    layer, x = in_fp8(linear(64, 48)), torch.randn(3, 64, requires_grad=True)
    layer(x).square().sum().backward()
    gradient, x.grad = x.grad, None
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, gradient)


@pytest.mark.skipif(PRODUCT is stand_in, reason="this torch multiplies fp8 rows on a GPU only")
def test_a_compiler_sees_one_graph(monkeypatch):
    monkeypatch.setattr(torch, "_scaled_mm", PRODUCT)
    layer = in_fp8(linear(64, 48, bias=True))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for rows in (3, 5, 7):  # of any number
        x, again = (torch.ones(rows, 64).cumsum(dim=1).requires_grad_() for _ in range(2))
        layer(x).square().sum().backward()
        compiled(again).square().sum().backward()
        torch.testing.assert_close(again.grad, x.grad)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def tiny_llm():
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)).bfloat16().requires_grad_(False)


def test_a_compiled_llama_of_any_length(monkeypatch):
    """With sizes as variables: no number in the products may be taken for one."""
    monkeypatch.setattr(torch, "_scaled_mm", PRODUCT)
    # Attention on a CPU is no single graph.
    monkeypatch.setattr(fast_llama, "joint_attention", lambda qkv, groups, *_: qkv[:, : qkv.shape[1] - 2 * groups])
    torch.manual_seed(0)
    llm = tiny_llm()
    fuse_projections(llm)
    assert allow_packing(llm)
    convert_to_fp8(llm)
    (micro_batch,) = pack([[1, 2, 3, 4, 5], [1, 6, 7]], [[-100, 2, 3, 4, 5], [-100, 6, 7]], 1024).micro_batches
    embeds = torch.randn(1, micro_batch.sizes.tokens, 32, dtype=torch.bfloat16, requires_grad=True)
    results = []
    for compiled in (False, True):
        fused = fast_llama.FusedLlama(llm, compiled=False)
        if compiled:
            compile = functools.partial(torch.compile, dynamic=True, backend="aot_eager")
            fused.pre_attention, fused.post_attention = compile(fused.pre_attention), compile(fused.post_attention)
        logits = fused(embeds, micro_batch)
        results.append((logits, torch.autograd.grad(logits.float().square().sum(), embeds)[0]))
    for eager, own in zip(*results, strict=True):
        assert (own - eager).norm() < 0.02 * eager.norm()


def test_the_encoders_sums_are_in_16_bit():
    torch.manual_seed(0)
    vit = create_vit("eva_tiny", 64).requires_grad_(False).eval()
    cast_matrices(vit, torch.bfloat16)
    images, kinds = torch.randn(2, 3, 64, 64), set()

    def block_fn(block, x, delta):
        kinds.add((x.dtype, delta.dtype))
        return run_block(block, x, delta)

    fused = FusedViT(vit, compiled=False)
    fused.block_fn = block_fn
    with torch.autocast("cpu", torch.bfloat16):
        expected = fused(images)
        assert kinds == {(torch.float32, torch.bfloat16)}
        kinds.clear()
        convert_to_fp8(tiny_llm(), vit)
        output = fused(images)
    assert kinds == {(torch.bfloat16, torch.bfloat16)}
    assert 0 < (output - expected).norm() < 0.05 * expected.norm()


def test_what_stays_as_it_is():
    layers = nn.ModuleList([linear(64, 48), linear(64, 40), linear(24, 48), linear(64, 48).half(), linear(64, 48)])
    layers[4].requires_grad_(True)
    layers.append(nn.Embedding(16, 16).bfloat16().requires_grad_(False))
    fp8.convert_linear_layers(layers, with_gradient=True)
    assert [isinstance(layer, fp8.Fp8Linear) for layer in layers] == [True, False, False, False, False, False]


# The tiny default, with its own weights


@pytest.mark.parametrize("fused", [False, True])
def test_the_whole_model(load_tiny, drawings, fused, products, caplog):
    """The loss to 5 %, and the direction of the projection's gradient, in which a small network feels any rounding:
    between bfloat16 and float32 the cosine is 0.990. In bfloat16 one kind of CPU finds a loss of 1.000, another 1.013.
    """
    model = load_tiny()
    names, shapes = zip(*((name, p.shape) for name, p in model.named_parameters()), strict=True)
    keys, taken = list(model.state_dict()), fingerprint.take(model.llama_model, "tiny", "{}", "\n")
    output, gradient = loss_and_gradient(model, drawings)
    if fused:
        assert fuse_projections(model.llama_model) == 6
    with caplog.at_level(logging.INFO):
        convert_to_fp8(model.llama_model, model.visual_encoder)
    per_layer, layers, blocks = 4 if fused else 7, 3, 6
    assert f"{per_layer * layers} linear layers compute in fp8, 0 do not, of LlamaDecoderLayer." in caplog.text
    assert f"{4 * blocks} linear layers compute in fp8, 0 do not, of EvaBlock." in caplog.text

    rounded_output, rounded_gradient = loss_and_gradient(model, drawings)
    loss, rounded_loss = output["loss"].item(), rounded_output["loss"].item()
    assert len(products) == 4 * blocks + 2 * per_layer * layers
    assert rounded_loss == pytest.approx(loss, rel=0.05) and rounded_loss != loss
    assert torch.cosine_similarity(rounded_gradient.flatten(), gradient.flatten(), dim=0) > 0.93

    assert tuple(name for name, _ in model.named_parameters()) == names and list(model.state_dict()) == keys
    assert tuple(p.shape for p in model.parameters()) == shapes
    own = fingerprint.take(model.llama_model, "tiny", "{}", "\n")
    assert fingerprint.difference_of(taken, own) is None
    convert_to_fp8(model.llama_model, model.visual_encoder)  # set up anew
    assert loss_and_gradient(model, drawings)[0]["loss"].item() == rounded_loss


def test_fused_layers_compute_what_separate_ones_do(load_tiny, drawings):
    separate, fused = load_tiny(), load_tiny()
    fuse_projections(fused.llama_model)
    for model in (separate, fused):
        convert_to_fp8(model.llama_model)
    for (name, a), (_, b) in zip(separate.named_parameters(), fused.named_parameters(), strict=True):
        assert a.dtype == b.dtype, name
        if a.dtype == fp8_rounding.E4M3:
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), name
    losses = [loss_and_gradient(model, drawings)[0]["loss"].item() for model in (separate, fused)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


def test_answers_after_training(load_tiny, drawings, products):
    """In the process that trains, answers come from the rounded layers too."""
    model = load_tiny()
    model.accelerate(packed=True, compiled=False, fp8=True)
    loss_and_gradient(model, drawings)
    products.clear()
    by_loop = {"decoding_loop": cached_decoding}
    first = model.generate(drawings["image"], ["<ImageHere>"] * 4, stop="\n", max_new_tokens=6, **by_loop)
    assert products and len(first) == 4
    assert model.generate(drawings["image"], ["<ImageHere>"] * 4, stop="\n", max_new_tokens=6, **by_loop) == first


def test_projections_are_joined_before(load_tiny):
    model = load_tiny()
    for _ in range(2):  # set up anew
        model.accelerate(packed=True, compiled=True, fp8=True)
    layer = model.llama_model.get_decoder().layers[0]
    assert type(layer.self_attn.q_proj.fused.joint) is type(layer.mlp.down_proj) is fp8.Fp8Linear
    assert layer.self_attn.q_proj.fused is layer.self_attn.v_proj.fused
    assert layer.self_attn.v_proj.weight.dtype == fp8_rounding.E4M3


def test_an_encoder_that_hands_on_its_sums(load_tiny, drawings, products, monkeypatch):
    """All four layers of a block keep their product in fp8; what GELU gives is rounded once, not to 16 bit before."""
    # Patches that were rounded otherwise would be other numbers in fp8.
    monkeypatch.setattr(fast_vit, "embed_patches", lambda patch_embed, image: patch_embed(image))
    model = load_tiny()
    with model.autocast(model.device):
        exact = model.visual_encoder(drawings["image"])
    vit = model.visual_encoder
    convert_to_fp8(model.llama_model, vit)
    assert supports_fused_vit(vit)
    with model.autocast(model.device):
        expected = vit(drawings["image"])
        products.clear()
        handed_on = FusedViT(vit, compiled=False)(drawings["image"])
    assert len(products) == 4 * len(vit.blocks)
    for result in (expected, handed_on):
        assert 0.02 < (result - exact).norm() / exact.norm() < 0.08


def test_an_encoder_that_trains_stays_as_it_is(load_tiny):
    model = load_tiny()
    model.visual_encoder.requires_grad_(True)
    convert_to_fp8(model.llama_model, model.visual_encoder)
    assert not any(isinstance(part, fp8.Fp8Linear) for part in model.visual_encoder.modules())
    assert isinstance(model.llama_model.get_decoder().layers[0].mlp.up_proj, fp8.Fp8Linear)


# Where it is not possible


@pytest.mark.parametrize("quantized", [False, True])
def test_a_model_without_such_layers(build_golden_model, load_tiny, quantized):
    model = load_tiny() if quantized else build_golden_model(dtype=torch.bfloat16)  # 40 wide, no multiple of 16
    if quantized:
        quantize_model(model.llama_model, model.device)
    with pytest.raises(ConfigError, match=r"run.fp8=True: the language model has no .*model.load_in=16bit"):
        model.accelerate(packed=False, compiled=False, fp8=True)


def test_a_bitsandbytes_model(load_tiny):
    pytest.importorskip("bitsandbytes")
    llm = load_tiny().llama_model
    quantize_by_bitsandbytes(llm.model, "4bit", torch.bfloat16)
    with pytest.raises(ConfigError, match=r"run.fp8=True: the language model has no .*model.load_in=16bit"):
        convert_to_fp8(llm)


@pytest.mark.parametrize(
    ("device", "capability", "dtype", "says"),
    [
        ("cpu", None, torch.float32, r"9\.0 or newer \(Hopper\); this run's device is cpu\. .*run\.fp8=False"),
        ("cuda", (8, 0), torch.bfloat16, r"this run's device is NVIDIA A100 \(8\.0\)"),
        ("cuda", (9, 0), torch.float16, r"computes in float16\. Set run\.amp=True and run\.amp_dtype=bf16"),
        ("cuda", (9, 0), torch.float32, r"computes in float32\. Set run\.amp=True and run\.amp_dtype=bf16"),
    ],
)
def test_gpus_and_types_that_cannot(monkeypatch, device, capability, dtype, says):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ConfigError, match=says):
        fp8.check_fp8_supported(SimpleNamespace(accelerate=None), torch.device(device), dtype)


def test_a_gpu_that_can(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs Triton"):
        fp8.check_fp8_supported(SimpleNamespace(accelerate=None), torch.device("cuda"), torch.bfloat16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    fp8.check_fp8_supported(SimpleNamespace(accelerate=None), torch.device("cuda"), torch.bfloat16)
    with pytest.raises(ConfigError, match="Linear has no `accelerate`"):
        fp8.check_fp8_supported(nn.Linear(2, 2), torch.device("cuda"), torch.bfloat16)
