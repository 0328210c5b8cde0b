"""The kernels that round rows to fp8, and those of norms, on a GPU. Skipped, and said so, without one that has fp8."""

import pytest
import torch
from fp8_cases import ATTENTIONS, CASES, WIDTHS, attention_error, case_errors, not_finite, sum_norm_errors

from minigpt4.models import fp8_rounding

pytestmark = [
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a GPU of compute capability 8.9 (Ada)",
    ),
    pytest.mark.usefixtures("poisoned_memory"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


@DTYPES
@pytest.mark.parametrize("name", CASES)
def test_values_and_scales(name, dtype):
    """Numbers of three bits of mantissa, rounded to the nearest, are off by some 2.6 % in the root mean square."""
    values, scales = case_errors(name, dtype, "cuda")
    assert values < 0.035 and scales < (1e-3 if name == "gelu" else 1e-5)  # GELU's tanh form


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_zeros_and_rows_that_are_not_finite(dtype):
    assert not_finite(dtype, "cuda") == [True, True, False, False, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_sum_norm(width, dtype):
    norm, third, total = sum_norm_errors(width, False, dtype, "cuda")
    assert total < 1e-6 and max(norm, third) < 4e-3
    norm, third, total = sum_norm_errors(width, True, dtype, "cuda")
    assert total < 1e-6 and max(norm, third) < 0.035


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [*ATTENTIONS, (64, 257, 16, 88)])
def test_attention(sizes, dtype):
    assert attention_error(*sizes, dtype, "cuda") < 5e-3


@pytest.mark.parametrize("width", [1408, 4096, 12288])
def test_rows_are_those_of_plain_operations(width):
    from minigpt4.models import fp8_kernels

    x = torch.randn(64, width, device="cuda", dtype=torch.bfloat16)
    (values, scales), (expected, expected_scales) = fp8_kernels.rows(x), fp8_rounding.quantize_rows(x)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    assert (values.float() != expected.float()).float().mean() < 1e-3  # a quotient between two numbers
