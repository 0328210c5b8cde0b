"""The fused vision encoder compared with timm's own forward pass, and when it is used."""

import pytest
import torch
from helpers import VIT
from timm.layers import DropPath, LayerNorm, SwiGLU
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from minigpt4.common.schema import VIT_MODELS
from minigpt4.fast import vit as fast_vit
from minigpt4.fast.self_check import sees_like_the_library
from minigpt4.fast.vit import FusedViT, linear_gelu, run_block, supports_fused_vit
from minigpt4.models.eva_vit import EvaViT, create_vit
from minigpt4.quantization import fp8


@pytest.fixture
def vit():
    """A frozen encoder all of whose weights are random: norms, biases and positions too."""
    torch.manual_seed(0)
    vit = create_vit(VIT, 42)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    return vit.requires_grad_(False).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(1))


def fused(vit, block_fn):
    """A `FusedViT` with another function for its blocks."""
    made = FusedViT(vit, compiled=False)
    made.block_fn = block_fn
    return made


# What it computes


def test_equals_timms_forward(vit, images):
    torch.testing.assert_close(FusedViT(vit, compiled=False)(images), vit(images), rtol=1e-5, atol=5e-5)


def test_each_block_equals_timms(vit, images):
    """To the bit: the sums are taken in the same order."""
    x = torch.randn(2, 10, VIT["embed_dim"])
    for block in vit.blocks:
        delta = torch.randn_like(x)
        assert torch.equal(sum(run_block(block, x, delta)), block(x + delta))


def test_in_16_bit(vit, images):
    """The stream of sums stays in float32, as timm's does; products are in 16 bit."""
    kinds = set()

    def block_fn(block, x, delta):
        kinds.add((x.dtype, delta.dtype))
        return run_block(block, x, delta)

    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(fused(vit, block_fn)(images), vit(images), rtol=1e-5, atol=5e-5)
    assert kinds == {(torch.float32, torch.bfloat16)}


def test_all_blocks_share_one_compilation(vit, images):
    compiles = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    block_fn = torch.compile(run_block, backend=compiles, fullgraph=True)
    torch.testing.assert_close(fused(vit, block_fn)(images), vit(images), rtol=1e-5, atol=5e-5)
    assert compiles.frame_count == 1
    for count in (3, 5):  # once more, for any number of images
        some = torch.randn(count, 3, 42, 42)
        torch.testing.assert_close(fused(vit, block_fn)(some), vit(some), rtol=1e-5, atol=5e-5)
    assert compiles.frame_count == 2
    torch._dynamo.reset()


def test_with_linear_gelu(vit, images, monkeypatch):
    """The MLP by way of it, compiled too, as it is on a GPU."""
    monkeypatch.setattr(fast_vit, "_takes_linear_gelu", lambda layer: True)
    torch.testing.assert_close(FusedViT(vit, compiled=False)(images), vit(images), rtol=1e-5, atol=5e-5)
    torch._dynamo.reset()
    compiles = CompileCounterWithBackend("aot_eager")
    block_fn = torch.compile(run_block, backend=compiles, fullgraph=True)
    torch.testing.assert_close(fused(vit, block_fn)(images), vit(images), rtol=1e-5, atol=5e-5)
    assert torch.ops.minigpt4.linear_gelu.default in {node.target for node in compiles.graphs[0].graph.nodes}
    torch._dynamo.reset()


# When it is used


def test_a_compiled_step_of_a_frozen_encoder(build_golden_model):
    """Set up anew without it, or with an encoder that trains by now, the step takes timm's own forward pass."""
    model = build_golden_model()
    vit, images = model.visual_encoder, torch.randn(2, 3, 28, 28)
    expected = model.query_outputs(images)
    model.accelerate(packed=False, compiled=True)
    assert not any(block._compiled_call_impl for block in vit.blocks)  # compiled as a function, not by themselves
    assert model.step.fused_vit.block_fn is not run_block and model.step.graphed_vision
    model.step.fused_vit.block_fn, model.step.graphed_vision = run_block, None
    torch.testing.assert_close(model.step.vision(model, images), expected, rtol=1e-5, atol=5e-5)
    model.accelerate(packed=False, compiled=False)
    assert model.step.fused_vit is None
    torch.testing.assert_close(model.step.vision(model, images), expected, rtol=1e-5, atol=5e-5)
    vit.requires_grad_(True)
    model.accelerate(packed=False, compiled=True)
    assert model.step.fused_vit is None and all(block._compiled_call_impl for block in vit.blocks)


def test_the_encoders_of_the_shipped_names():
    for name in VIT_MODELS:
        with torch.device("meta"):
            vit = create_vit(name, 224)
        assert not supports_fused_vit(vit)  # it would train
        assert supports_fused_vit(vit.requires_grad_(False))


def trains(vit):
    vit.blocks[1].mlp.fc1.bias.requires_grad_(True)


def recomputes(vit):
    vit.set_grad_checkpointing(True)


def drops_paths(vit):
    vit.blocks[2].drop_path2 = DropPath(0.1)


def scales_layers(vit):
    vit.blocks[0] = EvaBlock(VIT["embed_dim"], VIT["num_heads"], init_values=0.5).requires_grad_(False)


def other_attention(**kwargs):
    def change(vit):
        vit.blocks[1].attn = EvaAttention(VIT["embed_dim"], VIT["num_heads"], **kwargs).requires_grad_(False)

    return change


def other_mlp(vit):
    vit.blocks[0].mlp = SwiGLU(VIT["embed_dim"], 48).requires_grad_(False)


def is_a_plugins_own(vit):
    vit.__class__ = type("Own", (EvaViT,), {})


def norms_later(vit):
    vit.blocks[0] = EvaBlockPostNorm(VIT["embed_dim"], VIT["num_heads"]).requires_grad_(False)


def agrees(vit) -> bool:
    return sees_like_the_library(vit, FusedViT(vit, compiled=False), torch.autocast("cpu", enabled=False))


@pytest.mark.parametrize("change", [trains, recomputes, is_a_plugins_own])
def test_encoders_that_are_not_fused(vit, change):
    assert supports_fused_vit(vit)
    change(vit)
    assert not supports_fused_vit(vit)


@pytest.mark.parametrize(
    "change",
    [
        *(scales_layers, norms_later, other_mlp),
        other_attention(scale_norm=True, norm_layer=LayerNorm),
        other_attention(scale_norm=False, qk_norm=True, norm_layer=LayerNorm),
        other_attention(scale_norm=False, qkv_bias=False),
        other_attention(scale_norm=False, qkv_fused=False),
        other_attention(scale_norm=False, gated=True),
    ],
)
def test_blocks_that_compute_something_else_are_found(vit, change, caplog):
    """A single block is enough."""
    assert agrees(vit)
    change(vit)
    for parameter in vit.parameters():
        nn.init.normal_(parameter, std=0.2)
    assert not agrees(vit)
    assert "fused vision encoder" in caplog.text


def test_dropout_is_off_in_a_frozen_encoder(vit):
    drops_paths(vit)
    assert agrees(vit.eval())


def test_encoders_of_others_take_the_plain_way():
    assert not supports_fused_vit(
        Eva(img_size=28, patch_size=14, embed_dim=32, depth=1, num_heads=4).requires_grad_(False)
    )
    assert not supports_fused_vit(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize(
    ("device", "dtype", "bias", "takes"),
    [
        ("cuda", torch.bfloat16, True, True),
        ("cuda", torch.float16, True, True),
        ("cuda", torch.float32, True, False),
        ("cpu", torch.bfloat16, True, False),
        ("cuda", torch.bfloat16, False, False),
    ],
)
def test_which_layers_take_linear_gelu(device, dtype, bias, takes):
    """Of tensors that only claim to lie on a GPU."""
    with FakeTensorMode():
        layer = nn.Linear(16, 32, bias=bias, device=device, dtype=dtype)
        assert fast_vit._takes_linear_gelu(layer) == takes
    in_fp8 = fp8.Fp8Linear(nn.Linear(16, 32, bias=bias, dtype=torch.bfloat16).requires_grad_(False), False)
    assert not fast_vit._takes_linear_gelu(in_fp8)


# linear_gelu


def layer(dtype=torch.float32):
    torch.manual_seed(2)
    return torch.randn(2, 3, 8).to(dtype), torch.randn(12, 8).to(dtype), torch.randn(12).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8), (0, 8)])
def test_linear_gelu(dtype, shape):
    _, weight, bias = layer(dtype)
    x = torch.randn(shape).to(dtype)
    y = linear_gelu(x, weight, bias)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 12)
    sums = x.double() @ weight.double().t() + bias.double()
    exact = sums * 0.5 * (1 + torch.erf(sums / 2**0.5))
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_gelu_is_a_sound_operator(dtype):
    """Its schema, and what it says of shapes and types to a compiler, for any number of rows."""
    x, weight, bias = layer(dtype)
    torch.library.opcheck(linear_gelu, (x, weight, bias))
    torch.library.opcheck(linear_gelu, (x.transpose(0, 1), weight, bias))
    on_meta = linear_gelu(*(tensor.to("meta") for tensor in (x, weight, bias)))
    assert on_meta.shape == (2, 3, 12) and on_meta.dtype == dtype and on_meta.device.type == "meta"


def test_linear_gelu_has_no_gradient_and_says_so():
    x, weight, bias = layer()
    y = linear_gelu(x.requires_grad_(), weight, bias)
    with pytest.raises(RuntimeError, match="linear_gelu"):
        y.sum().backward()
