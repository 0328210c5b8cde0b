"""The kernels that round rows to fp8, and those of norms, against float64, on the GPU or, as a script, interpreted.

    TRITON_INTERPRET=1 python tests/fp8_cases.py

prints a JSON object: for each of CASES the relative errors of the values times their scales, and of the scales; for
the norms those of sum and norm, for each of WIDTHS. The interpreter's numbers are not rounded to 8 bits: it does so
wrongly (Triton 3.8 makes 64 of 124.1).
"""

import itertools
import json

import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from training_cases import rotate, silu_product

from minigpt4.quantization import fp8_rounding


def silu_product_gradient(grad, gate_up) -> torch.Tensor:
    return torch.func.vjp(silu_product, gate_up)[1](grad)[0]


def turned_back(x, cos, sin, turned: int) -> torch.Tensor:
    return rotate(x, cos, -sin, turned).flatten(1)


# Kernel, what it rounds, shapes of its inputs, and other arguments.
CASES = {
    "rows": ("rows", lambda x: x, [(5, 1408)]),
    "rows of a power of two": ("rows", lambda x: x, [(3, 64)]),
    "gelu": ("gelu", F.gelu, [(7, 200)]),
    "silu_product": ("silu_product", silu_product, [(4, 2 * 1500)]),
    "silu_product_gradient": ("silu_product_gradient", silu_product_gradient, [(4, 1500), (4, 3000)]),
    "silu_product_gradient of one column": ("silu_product_gradient", silu_product_gradient, [(1, 1), (1, 2)]),
    "turned_back": ("turned_back", turned_back, [(5, 6, 8), (5, 4), (5, 4)], 4),
    "turned_back, odd sizes": ("turned_back", turned_back, [(3, 9, 24), (3, 12), (3, 12)], 7),
}

# Columns of a norm.
WIDTHS = (40, 64, 1408)


def case_errors(name: str, dtype: torch.dtype, device: str) -> list[float]:
    from minigpt4.kernels import fp8 as fp8_kernels

    kernel, function, shapes, *others = CASES[name]
    inputs = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
    values, scale = getattr(fp8_kernels, kernel)(*inputs, *others)
    expected = function(*(x.double() for x in inputs), *others)
    largest = expected.abs().amax(1, keepdim=True)
    pairs = (values.double() * scale, expected), (448 * scale.double(), largest)
    return [((a - b).norm() / b.norm()).item() for a, b in pairs]


def not_finite(dtype: torch.dtype, device: str) -> list[bool]:
    """Of rows of zeros, of a small number, with an infinity, with NaN, of two numbers: which come out finite."""
    from minigpt4.kernels import fp8 as fp8_kernels

    x = torch.tensor([[0, 0], [1e-38, 0], [torch.inf, 1], [1, torch.nan], [1, 2]], dtype=dtype, device=device)
    values, scale = fp8_kernels.rows(x)
    return (values.float() * scale).isfinite().all(dim=1).tolist()


def sum_norm_errors(width: int, in_fp8: bool, dtype: torch.dtype, device: str) -> list[float]:
    """Of the norm of a sum of float32 and `dtype`, and of the sum and norm of three terms."""
    from minigpt4.kernels import vit as vit_kernels

    x, weight, bias = (torch.randn(shape, device=device) for shape in ((2, 3, width), (width,), (width,)))
    deltas = list(torch.randn(2, 2, 3, width, dtype=dtype, device=device))
    pairs = []
    for keep in (False, True):
        terms = [x, *deltas[: 1 + keep]]
        *total, normed, scale = [*vit_kernels.sum_norm(terms, weight, bias, 1e-6, in_fp8)] + [1.0] * (not in_fp8)
        assert len(total) == keep and (in_fp8 or normed.dtype == dtype)
        expected = sum(term.double() for term in terms)
        norm = F.layer_norm(expected, (width,), weight.double(), bias.double(), 1e-6)
        pairs += [((normed.double() * scale).view(x.shape), norm), *((t, expected) for t in total)]
        assert all(t.dtype == torch.float32 for t in total)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in pairs]


# Images, tokens, heads, dimensions.
ATTENTIONS = [
    (2, 257, 2, 88),
    (2, 17, 2, 16),
    (1, 65, 1, 32),
    (1, 64, 2, 40),
    (1, 130, 2, 64),
    (3, 5, 1, 100),
    (2, 9, 2, 8),
]


def attention_error(images: int, tokens: int, heads: int, d: int, dtype: torch.dtype, device: str) -> float:
    from minigpt4.kernels.vit import attention

    qkv = torch.randn(images, tokens, 3 * heads * d, dtype=dtype, device=device)
    output = attention(qkv, heads)
    q, k, v = qkv.double().view(images, tokens, 3, heads, d).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert output.dtype == dtype and output.shape == expected.shape
    return ((output.double() - expected).norm() / expected.norm()).item()


def compilations() -> list[int]:
    """Of each kernel, for batches of four lengths: the number of rows is a variable."""
    from minigpt4.kernels import fp8 as fp8_kernels
    from minigpt4.kernels import vit as vit_kernels

    def sum_norm(x):
        return vit_kernels.sum_norm([x, x, x], x[0], x[0], 1e-6, True)

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
    from minigpt4.kernels import fp8 as fp8_kernels
    from minigpt4.kernels import vit as vit_kernels

    torch.manual_seed(0)
    # New memory holds NaN: what the kernels leave out would show.
    torch.use_deterministic_algorithms(True, warn_only=True)
    fp8_kernels.DTYPE = torch.float32
    results = {name: case_errors(name, torch.float32, "cpu") for name in CASES}
    results["not finite"] = not_finite(torch.float32, "cpu")
    for name in ("sum_norm", "sum_norm in fp8"):
        results[name] = [sum_norm_errors(k, name != "sum_norm", torch.float32, "cpu") for k in WIDTHS]
    results["attention"] = [attention_error(*sizes, torch.float32, "cpu") for sizes in ATTENTIONS]
    fp8_kernels.DTYPE = fp8_rounding.DTYPE
    for kernel in ("rows", "gelu", "silu_product", "silu_product_gradient"):
        arguments = tuple(torch.randn(shape) for shape in CASES[kernel][2])
        torch.library.opcheck(getattr(fp8_kernels, kernel), arguments, test_utils=("test_schema", "test_faketensor"))
    terms = [torch.randn(2, 3, 40) for _ in range(3)]
    for count, in_fp8 in itertools.product((2, 3), (False, True)):
        arguments = terms[:count], torch.randn(40), torch.randn(40), 1e-6, in_fp8
        torch.library.opcheck(vit_kernels.sum_norm, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(
        vit_kernels.attention, (torch.randn(1, 5, 24), 1), test_utils=("test_schema", "test_faketensor")
    )
    results["compilations"] = compilations()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
