"""The fp8 kernels and the vision encoder's on a GPU. Skipped without one that has fp8, with the reason."""

import pytest
import torch
from fp8_cases import (
    ATTENTION_CASES,
    NORM_WIDTHS,
    QUANTIZE_CASES,
    attention_error,
    finite_rows,
    layer_norm_errors,
    quantize_errors,
)
from training_cases import lengths_to_starts

from minigpt4.quantization import fp8_rounding

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a GPU of compute capability 8.9 (Ada)",
    ),
    pytest.mark.usefixtures("poisoned_memory"),
]
EACH_DTYPE = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


@EACH_DTYPE
@pytest.mark.parametrize("name", QUANTIZE_CASES)
def test_values_and_scales(name, dtype):
    """Rounding to three bits of mantissa has a root mean square error of about 2.6 %."""
    values, scales = quantize_errors(name, dtype, "cuda")
    assert values < 0.035 and scales < (1e-3 if name == "gelu" else 1e-5)  # GELU's tanh form


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_zeros_and_rows_that_are_not_finite(dtype):
    assert finite_rows(dtype, "cuda") == [True, True, False, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", NORM_WIDTHS)
def test_add_layer_norm(width, dtype):
    norm, norm_of_three, total = layer_norm_errors(width, False, dtype, "cuda")
    assert total < 1e-6 and max(norm, norm_of_three) < 4e-3
    norm, norm_of_three, total = layer_norm_errors(width, True, dtype, "cuda")
    assert total < 1e-6 and max(norm, norm_of_three) < 0.035


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [*ATTENTION_CASES, (64, 257, 16, 88)])
def test_vit_attention(sizes, dtype):
    assert attention_error(*sizes, dtype, "cuda") < 5e-3


@pytest.mark.parametrize("width", [1408, 4096, 12288])
def test_rows_equal_those_of_torch_operations(width):
    from minigpt4.kernels import fp8 as fp8_kernels

    x = torch.randn(64, width, device="cuda", dtype=torch.bfloat16)
    (values, scales), (expected, expected_scales) = fp8_kernels.quantize_rows(x), fp8_rounding.quantize_rows(x)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    assert (values.float() != expected.float()).float().mean() < 1e-3  # quotients halfway between two e4m3 numbers


def test_rope_attention():
    """Output and gradient of a linear layer, RoPE and attention: fp8 compared with 16 bit."""
    from minigpt4.fast.fused_linear import fuse_projections, fused_layers
    from minigpt4.fast.rope_attention import rope_attention
    from minigpt4.quantization import fp8

    torch.manual_seed(0)
    parts = {name: torch.nn.Linear(256, 256, bias=False) for name in ("q_proj", "k_proj", "v_proj")}
    attention = torch.nn.ModuleDict(parts).to("cuda", torch.bfloat16).requires_grad_(False)
    fuse_projections(attention)
    starts, max_kv_len = lengths_to_starts([40, 63, 25], 1, "cuda")
    x = torch.randn(int(starts[-1]), 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    angles = torch.rand(len(x), 32, device="cuda") * 7
    results = []
    for in_fp8 in (False, True):
        if in_fp8:
            (fused,) = fused_layers(attention)
            fused.replace_joint(fp8.Fp8Linear(fused.joint, with_gradient=True, from_norm=True))
            fp8.convert_linear_layers(attention, with_gradient=True)
        joint = attention.q_proj.fused.joint
        output = rope_attention(x, joint, 64, 4, angles.cos(), angles.sin(), starts, 1, max_kv_len, 0.125)
        results.append((output, *torch.autograd.grad(output, x, torch.ones_like(output))))
    assert isinstance(attention.q_proj.fused.joint, fp8.Fp8Linear)
    for exact, rounded in zip(*results, strict=True):
        assert 0.005 < (exact - rounded).norm() / exact.norm() < 0.1
