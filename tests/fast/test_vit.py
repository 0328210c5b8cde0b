"""The encoder that hands on its sums against timm's own forward pass, and when it is used at all."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import VIT
from timm.layers import DropPath, LayerNorm, Mlp, RmsNorm, SwiGLU
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from minigpt4.common.schema import VIT_MODELS
from minigpt4.fast import training_step
from minigpt4.fast import vit as fast_vit
from minigpt4.fast.vit import forward_features, linear_gelu, run_block
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


# What it computes


def test_equals_timms_forward(vit, images):
    torch.testing.assert_close(forward_features(vit, images, run_block), vit(images), rtol=1e-5, atol=5e-5)


def test_each_block_equals_timms(vit, images):
    """To the bit: the sums are taken in the same order."""
    x = torch.randn(2, 10, VIT["embed_dim"])
    for block in vit.blocks:
        delta = torch.randn_like(x)
        assert torch.equal(sum(run_block(block, x, delta)), block(x + delta))


def test_in_16_bit(vit, images):
    """The stream of sums stays in float32, as timm's does; products are in 16 bit."""
    kinds = set()

    def unit(block, x, delta):
        kinds.add((x.dtype, delta.dtype))
        return run_block(block, x, delta)

    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(forward_features(vit, images, unit), vit(images), rtol=1e-5, atol=5e-5)
    assert kinds == {(torch.float32, torch.bfloat16)}


def test_all_blocks_share_one_compilation(vit, images):
    compiles = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    unit = torch.compile(run_block, backend=compiles, fullgraph=True)
    torch.testing.assert_close(forward_features(vit, images, unit), vit(images), rtol=1e-5, atol=5e-5)
    assert compiles.frame_count == 1
    for count in (3, 5):  # once more, for any number of images
        some = torch.randn(count, 3, 42, 42)
        torch.testing.assert_close(forward_features(vit, some, unit), vit(some), rtol=1e-5, atol=5e-5)
    assert compiles.frame_count == 2
    torch._dynamo.reset()


def test_with_linear_gelu(vit, images, monkeypatch):
    """The MLP by way of it, compiled too, as it is on a GPU."""
    monkeypatch.setattr(fast_vit, "_takes_linear_gelu", lambda layer: True)
    torch.testing.assert_close(forward_features(vit, images, run_block), vit(images), rtol=1e-5, atol=5e-5)
    torch._dynamo.reset()
    compiles = CompileCounterWithBackend("aot_eager")
    unit = torch.compile(run_block, backend=compiles, fullgraph=True)
    torch.testing.assert_close(forward_features(vit, images, unit), vit(images), rtol=1e-5, atol=5e-5)
    assert torch.ops.minigpt4.linear_gelu.default in {node.target for node in compiles.graphs[0].graph.nodes}
    torch._dynamo.reset()


# When it is used


def test_compiled_set_up_of_a_frozen_encoder(build_golden_model, monkeypatch):
    """Set up anew without it, and with an encoder that trains by now, timm's own forward pass is back."""
    monkeypatch.setattr(training_step, "fuse_projections", lambda llm: 0)
    model = build_golden_model()
    vit, images = model.visual_encoder, torch.randn(2, 3, 28, 28)
    expected = vit(images)
    training_step.accelerate(model, packed=False, compiled=True)
    assert not any(block._compiled_call_impl for block in vit.blocks)  # compiled in their unit, not by themselves
    unit = vit.forward_features.keywords["unit"]
    vit.forward_features.keywords["unit"] = run_block
    assert unit is not run_block
    torch.testing.assert_close(vit(images), expected, rtol=1e-5, atol=5e-5)
    training_step.accelerate(model, packed=False, compiled=False)
    assert "forward_features" not in vars(vit) and torch.equal(vit(images), expected)
    training_step.accelerate(model, packed=False, compiled=True)
    assert "forward_features" in vars(vit)
    vit.requires_grad_(True)
    training_step.accelerate(model, packed=False, compiled=True)
    assert "forward_features" not in vars(vit) and all(block._compiled_call_impl for block in vit.blocks)


def test_the_encoders_of_the_shipped_names():
    for name in VIT_MODELS:
        with torch.device("meta"):
            vit = create_vit(name, 224)
        assert not fast_vit.fits(vit)  # it would train
        assert fast_vit.fits(vit.requires_grad_(False))


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


def other_norm(kind, **kwargs):
    def change(vit):
        vit.blocks[1].norm2 = kind(VIT["embed_dim"], **kwargs).requires_grad_(False)

    return change


def is_a_plugins_own(vit):
    vit.__class__ = type("Own", (EvaViT,), {})


def norms_later(vit):
    vit.blocks[0] = EvaBlockPostNorm(VIT["embed_dim"], VIT["num_heads"]).requires_grad_(False)


@pytest.mark.parametrize(
    "change",
    [
        *(trains, recomputes, drops_paths, scales_layers, norms_later, is_a_plugins_own, other_mlp),
        other_norm(RmsNorm),
        other_norm(type("Own", (LayerNorm,), {})),
        other_norm(nn.LayerNorm, bias=False),
        other_attention(scale_norm=True, norm_layer=LayerNorm),
        other_attention(scale_norm=False, qk_norm=True, norm_layer=LayerNorm),
        other_attention(scale_norm=False, qkv_bias=False),
        other_attention(scale_norm=False, qkv_fused=False),
        other_attention(scale_norm=False, gated=True),
        other_attention(scale_norm=False, proj_drop=0.1),
        other_attention(scale_norm=False, attn_drop=0.1),
    ],
)
def test_what_takes_the_plain_way(vit, change):
    assert fast_vit.fits(vit)
    change(vit)
    assert not fast_vit.fits(vit)


def test_encoders_of_others_take_the_plain_way():
    assert not fast_vit.fits(Eva(img_size=28, patch_size=14, embed_dim=32, depth=1, num_heads=4).requires_grad_(False))
    assert not fast_vit.fits(nn.Linear(2, 2).requires_grad_(False))


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
        layer.__class__ = fp8.Fp8Linear
        assert not fast_vit._takes_linear_gelu(layer)


@pytest.mark.parametrize(
    ("kwargs", "plain"),
    [
        ({}, True),
        ({"act_layer": nn.SiLU}, False),
        ({"act_layer": partial(nn.GELU, approximate="tanh")}, False),
        ({"norm_layer": LayerNorm}, False),
        ({"drop": 0.1}, False),
    ],
)
def test_which_mlps_are_plain(kwargs, plain):
    assert fast_vit._is_plain_mlp(Mlp(16, 32, **kwargs)) == plain
    assert not fast_vit._is_plain_mlp(SwiGLU(16, 32))


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
    torch.testing.assert_close(y, F.gelu(F.linear(x, weight, bias)))


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
