"""Compare the fp8 kernels and the vision encoder's with float64, on a GPU, or as a script with Triton's interpreter.

    TRITON_INTERPRET=1 python tests/fp8_cases.py

prints a JSON object. For each of QUANTIZE_CASES it holds the relative errors of values * scale, and of the scales; for
the layer norms those of norm and sum, for each of NORM_WIDTHS. When interpreted, numbers are not rounded to 8 bits: the
interpreter rounds wrongly (Triton 3.8 makes 64 of 124.1).
"""

import itertools
import json

import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from training_cases import relative_errors, rotate, silu_product


def silu_product_gradient(grad, gate_up) -> torch.Tensor:
    return torch.func.vjp(silu_product, gate_up)[1](grad)[0]


def inverse_rope(x, cos, sin, num_heads: int) -> torch.Tensor:
    return rotate(x, cos, -sin, num_heads).flatten(1)


# Kernel, the function whose result it quantizes, shapes of its inputs, and other arguments.
QUANTIZE_CASES = {
    "rows": ("quantize_rows", lambda x: x, [(5, 1408)]),
    "rows of a power of two": ("quantize_rows", lambda x: x, [(3, 64)]),
    "gelu": ("quantize_rows", lambda x, gelu: F.gelu(x), [(7, 200)], True),
    "silu_product": ("silu_product_quantize", silu_product, [(4, 2 * 1500)]),
    "silu_product_gradient": ("silu_product_gradient_quantize", silu_product_gradient, [(4, 1500), (4, 3000)]),
    "silu_product_gradient of one column": (
        "silu_product_gradient_quantize",
        silu_product_gradient,
        [(1, 1), (1, 2)],
    ),
    "inverse_rope": ("inverse_rope_quantize", inverse_rope, [(5, 6, 8), (5, 4), (5, 4)], 4),
    "inverse_rope, odd sizes": ("inverse_rope_quantize", inverse_rope, [(3, 9, 24), (3, 12), (3, 12)], 7),
}

NORM_WIDTHS = (40, 64, 1408)


def quantize_errors(name: str, dtype: torch.dtype, device: str) -> list[float]:
    from minigpt4.kernels import fp8 as fp8_kernels

    kernel, function, shapes, *others = QUANTIZE_CASES[name]
    inputs = [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]
    values, scale = getattr(fp8_kernels, kernel)(*inputs, *others)
    expected = function(*(x.double() for x in inputs), *others)
    row_max = expected.abs().amax(1, keepdim=True)
    return relative_errors([values.double() * scale, 448 * scale.double()], [expected, row_max])


def finite_rows(dtype: torch.dtype, device: str) -> list[bool]:
    """Which of these rows are finite after quantization: zeros, a small number, an infinity, a NaN, two numbers."""
    from minigpt4.kernels import fp8 as fp8_kernels

    x = torch.tensor([[0, 0], [1e-38, 0], [torch.inf, 1], [1, torch.nan], [1, 2]], dtype=dtype, device=device)
    values, scale = fp8_kernels.quantize_rows(x)
    return (values.float() * scale).isfinite().all(dim=1).tolist()


def layer_norm_errors(width: int, in_fp8: bool, dtype: torch.dtype, device: str) -> list[float]:
    """Of the norm of two terms, the norm of three, and the sum of three. The first is float32, the others `dtype`."""
    from minigpt4.kernels import vit as vit_kernels

    x, weight, bias = (torch.randn(shape, device=device) for shape in ((2, 3, width), (width,), (width,)))
    deltas = list(torch.randn(2, 2, 3, width, dtype=dtype, device=device))
    pairs = []
    for num_deltas in (1, 2):
        terms = [x, *deltas[:num_deltas]]
        outputs = vit_kernels.add_layer_norm(terms, weight, bias, 1e-6, in_fp8)
        *total, normed, scale = outputs if in_fp8 else [*outputs, 1.0]
        assert len(total) == num_deltas - 1 and (in_fp8 or normed.dtype == dtype)
        assert all(t.dtype == torch.float32 for t in total)
        expected = sum(term.double() for term in terms)
        norm = F.layer_norm(expected, (width,), weight.double(), bias.double(), 1e-6)
        pairs += [((normed.double() * scale).view(x.shape), norm), *((t, expected) for t in total)]
    return relative_errors(*zip(*pairs, strict=True))


# Images, tokens, heads, dimensions of a head.
ATTENTION_CASES = [
    (2, 257, 2, 88),
    (2, 17, 2, 16),
    (1, 65, 1, 32),
    (1, 64, 2, 40),
    (1, 130, 2, 64),
    (3, 5, 1, 100),
    (2, 9, 2, 8),
]


def attention_error(images: int, tokens: int, num_heads: int, d: int, dtype: torch.dtype, device: str) -> float:
    from minigpt4.kernels.vit import vit_attention

    qkv = torch.randn(images, tokens, 3 * num_heads * d, dtype=dtype, device=device)
    output = vit_attention(qkv, num_heads)
    q, k, v = qkv.double().view(images, tokens, 3, num_heads, d).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert output.dtype == dtype and output.shape == expected.shape
    return relative_errors([output], [expected])[0]


def compilations() -> list[int]:
    """How often each op is compiled for batches of four lengths: once, if the number of rows is dynamic."""
    from minigpt4.kernels import fp8 as fp8_kernels
    from minigpt4.kernels import vit as vit_kernels

    functions = [
        fp8_kernels.quantize_rows,
        lambda x: fp8_kernels.quantize_rows(x, gelu=True),
        fp8_kernels.silu_product_quantize,
        lambda x: vit_kernels.add_layer_norm([x, x, x], x[0], x[0], 1e-6, True),
        lambda x: fp8_kernels.silu_product_gradient_quantize(x[:, :32].contiguous(), x),
    ]
    counts = []
    for function in functions:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, backend=counter, dynamic=True, fullgraph=True)
        for num_rows in (4, 7, 9, 12):
            compiled(torch.randn(num_rows, 64))
        counts.append(counter.frame_count)
    return counts


def check_ops() -> None:
    """Check schemas and fake implementations of the custom ops."""
    from minigpt4.kernels import fp8 as fp8_kernels
    from minigpt4.kernels import vit as vit_kernels

    checks = ("test_schema", "test_faketensor")
    for name in ("rows", "gelu", "silu_product", "silu_product_gradient"):
        kernel, _, shapes, *others = QUANTIZE_CASES[name]
        arguments = *(torch.randn(shape) for shape in shapes), *others
        torch.library.opcheck(getattr(fp8_kernels, kernel), arguments, test_utils=checks)
    terms = [torch.randn(2, 3, 40) for _ in range(3)]
    for count, in_fp8 in itertools.product((2, 3), (False, True)):
        arguments = terms[:count], torch.randn(40), torch.randn(40), 1e-6, in_fp8
        torch.library.opcheck(vit_kernels.add_layer_norm, arguments, test_utils=checks)
    torch.library.opcheck(vit_kernels.vit_attention, (torch.randn(1, 5, 24), 1), test_utils=checks)


def main() -> None:
    from minigpt4.kernels import e4m3 as e4m3_kernels

    torch.manual_seed(0)
    # New memory holds NaN, so that elements which a kernel does not write are noticed.
    torch.use_deterministic_algorithms(True, warn_only=True)
    e4m3, e4m3_kernels.DTYPE = e4m3_kernels.DTYPE, torch.float32
    results = {name: quantize_errors(name, torch.float32, "cpu") for name in QUANTIZE_CASES}
    results["finite rows"] = finite_rows(torch.float32, "cpu")
    for name, in_fp8 in (("layer norm", False), ("layer norm in fp8", True)):
        results[name] = [layer_norm_errors(width, in_fp8, torch.float32, "cpu") for width in NORM_WIDTHS]
    results["attention"] = [attention_error(*sizes, torch.float32, "cpu") for sizes in ATTENTION_CASES]
    e4m3_kernels.DTYPE = e4m3
    check_ops()
    results["compilations"] = compilations()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
