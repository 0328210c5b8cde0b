"""The kernels that round rows to fp8, and those of norms, against float64, on the GPU or, as a script, interpreted.

    TRITON_INTERPRET=1 python tests/fp8_cases.py

prints a JSON object: for each of CASES the relative errors of the values times their scales, and of the scales; for
the norms those of sum and norm, for each of WIDTHS. The interpreter's numbers are not rounded to 8 bits: it does so
wrongly (Triton 3.8 makes 64 of 124.1).
"""

import json

import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from training_cases import silu_product

from minigpt4.models import fp8_rounding


def silu_product_gradient(grad, gate_up) -> torch.Tensor:
    return torch.func.vjp(silu_product, gate_up)[1](grad)[0]


# Kernel, what it rounds, shapes of its inputs.
CASES = {
    "rows": ("rows", lambda x: x, [(5, 1408)]),
    "rows of a power of two": ("rows", lambda x: x, [(3, 64)]),
    "gelu": ("gelu", F.gelu, [(7, 200)]),
    "silu_product": ("silu_product", silu_product, [(4, 2 * 1500)]),
    "silu_product_gradient": ("silu_product_gradient", silu_product_gradient, [(4, 1500), (4, 3000)]),
    "silu_product_gradient of one column": ("silu_product_gradient", silu_product_gradient, [(1, 1), (1, 2)]),
}

# Columns of a norm.
WIDTHS = (40, 64, 1408)


def case_errors(name: str, dtype: torch.dtype, device: str) -> list[float]:
    from minigpt4.models import fp8_kernels

    kernel, function, shapes = CASES[name]
    inputs = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
    values, scale = getattr(fp8_kernels, kernel)(*inputs)
    expected = function(*(x.double() for x in inputs))
    largest = expected.abs().amax(1, keepdim=True)
    pairs = (values.double() * scale, expected), (448 * scale.double(), largest)
    return [((a - b).norm() / b.norm()).item() for a, b in pairs]


def not_finite(dtype: torch.dtype, device: str) -> list[bool]:
    """Of rows of zeros, of a small number, with an infinity, with NaN, of two numbers: which come out finite."""
    from minigpt4.models import fp8_kernels

    x = torch.tensor([[0, 0], [1e-38, 0], [torch.inf, 1], [1, torch.nan], [1, 2]], dtype=dtype, device=device)
    values, scale = fp8_kernels.rows(x)
    return (values.float() * scale).isfinite().all(dim=1).tolist()


def sum_norm_errors(width: int, rounded: bool, dtype: torch.dtype, device: str) -> list[float]:
    """Of the sum of float32 and `dtype`, and of its norm."""
    from minigpt4.models import vit_kernels

    x, weight, bias = (torch.randn(shape, device=device) for shape in ((2, 3, width), (width,), (width,)))
    delta = torch.randn(2, 3, width, dtype=dtype, device=device)
    kernel = vit_kernels.rounded_sum_norm if rounded else vit_kernels.sum_norm
    total, *normed = kernel(x, delta, weight, bias, 1e-6)
    normed = (normed[0].double() * normed[1]).view(x.shape) if rounded else normed[0]
    assert total.dtype == torch.float32 and (rounded or normed.dtype == dtype)
    expected = x.double() + delta
    norm = F.layer_norm(expected, (width,), weight.double(), bias.double(), 1e-6)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in ((total, expected), (normed, norm))]


def compilations() -> list[int]:
    """Of each kernel, for batches of four lengths: the number of rows is a variable."""
    from minigpt4.models import fp8_kernels, vit_kernels

    def sum_norm(x):
        return vit_kernels.rounded_sum_norm(x, x, x[0], x[0], 1e-6)

    functions = [
        *(fp8_kernels.rows, fp8_kernels.gelu, fp8_kernels.silu_product, sum_norm),
        lambda x: fp8_kernels.silu_product_gradient(x[:, :32].contiguous(), x),
    ]
    counts = []
    for function in functions:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, backend=counter, dynamic=True, fullgraph=True)
        for rows in (4, 7, 9, 12):
            compiled(torch.randn(rows, 64))
        counts.append(counter.frame_count)
    return counts


def main() -> None:
    from minigpt4.models import fp8_kernels, vit_kernels

    torch.manual_seed(0)
    # New memory holds NaN: what the kernels leave out would show.
    torch.use_deterministic_algorithms(True, warn_only=True)
    fp8_kernels.DTYPE = torch.float32
    results = {name: case_errors(name, torch.float32, "cpu") for name in CASES}
    results["not finite"] = not_finite(torch.float32, "cpu")
    for name in ("sum_norm", "rounded_sum_norm"):
        results[name] = [sum_norm_errors(k, name != "sum_norm", torch.float32, "cpu") for k in WIDTHS]
    fp8_kernels.DTYPE = fp8_rounding.DTYPE
    for kernel, _, shapes in CASES.values():
        arguments = tuple(torch.randn(shape) for shape in shapes)
        torch.library.opcheck(getattr(fp8_kernels, kernel), arguments, test_utils=("test_schema", "test_faketensor"))
    arguments = torch.randn(2, 3, 40), torch.randn(2, 3, 40), torch.randn(40), torch.randn(40), 1e-6
    for kernel in (vit_kernels.sum_norm, vit_kernels.rounded_sum_norm):
        torch.library.opcheck(kernel, arguments, test_utils=("test_schema", "test_faketensor"))
    results["compilations"] = compilations()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
