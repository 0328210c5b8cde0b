"""The kernels that round rows to fp8 against float64, on the GPU or, as a script, interpreted.

    TRITON_INTERPRET=1 python tests/fp8_cases.py

prints a JSON object: for each of CASES the relative errors of the values times their scales, and of the scales. The
interpreter's numbers are not rounded to 8 bits: it does so wrongly (Triton 3.8 makes 64 of 127.9).
"""

import json

import torch
import torch.nn.functional as F
from training_cases import silu_product

from minigpt4.models import fp8


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


def main() -> None:
    from minigpt4.models import fp8_kernels

    torch.manual_seed(0)
    # New memory holds NaN: what the kernels leave out would show.
    torch.use_deterministic_algorithms(True, warn_only=True)
    fp8_kernels.DTYPE = torch.float32
    results = {name: case_errors(name, torch.float32, "cpu") for name in CASES}
    results["not finite"] = not_finite(torch.float32, "cpu")
    fp8_kernels.DTYPE = fp8.DTYPE
    for kernel, _, shapes in CASES.values():
        arguments = tuple(torch.randn(shape) for shape in shapes)
        torch.library.opcheck(getattr(fp8_kernels, kernel), arguments, test_utils=("test_schema", "test_faketensor"))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
