"""Compare the decoding kernels with float64, on a GPU, or as a script with Triton's interpreter.

    TRITON_INTERPRET=1 python tests/decoding_cases.py

prints a JSON object: the relative error of each of LINEAR_CASES and ATTENTION_CASES (`dtypes_of` says in which types),
error messages, and how many dequantized 8-bit weights differ from torch's.
"""

import json

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Output features, input features, and elements between the rows of the weight.
LINEAR_CASES = {
    "one output of one input": (1, 1, 0),
    "odd": (5, 7, 0),
    "a weight row in one block": (64, 128, 0),
    "one output more": (65, 128, 0),
    "several blocks": (6, 4096, 0),
    "several blocks and one input more": (6, 4097, 0),
    "so many inputs that a program has fewer rows": (7, 11008, 0),
    "rows with gaps between them": (12, 96, 32),
}
# Rows, columns, and elements between the rows of an 8-bit weight.
DEQUANTIZE_CASES = {
    "one": (1, 1, 0),
    "odd": (5, 7, 0),
    "a program and one column more": (3, 4097, 0),
    "rows with gaps between them": (6, 96, 32),
}
# kv_len of each sequence, cache positions, query heads, key/value heads, dimensions of a head.
ATTENTION_CASES = {
    "one position": ([1], 1, 2, 2, 64),
    "one of many": ([1], 300, 2, 2, 128),
    "a block": ([128], 300, 2, 2, 128),
    "one position more than a block": ([129], 300, 2, 2, 128),
    "all positions": ([300], 300, 2, 2, 128),
    "sequences of different lengths": ([300, 1, 77, 250], 300, 2, 2, 128),
    "grouped heads": ([40, 150], 160, 6, 2, 64),
    "one head of keys": ([20, 70], 70, 4, 1, 64),
    "a head that is no power of two": ([200], 210, 4, 2, 80),
    "a narrow head": ([30, 70], 96, 2, 2, 8),
    "a wide head": ([300], 320, 2, 1, 256),
    "so many programs that each has fewer warps": ([3, 70] * 16, 80, 9, 3, 16),
}

# Those of them that are interpreted in 16 bit, too. A GPU tries all.
IN_16_BIT = (
    "odd",
    "several blocks and one input more",
    "sequences of different lengths",
    "grouped heads",
)


def dtypes_of(cases: dict) -> list[tuple[str, str]]:
    """(case, dtype) of what is interpreted."""
    return [(name, dtype) for name in cases for dtype in DTYPES if dtype == "float32" or name in IN_16_BIT]


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result.double() - expected).norm() / expected.norm()).item()


def linear_error(single_row_linear, name: str, dtype: torch.dtype, device: str, int8: bool = False) -> float:
    """x is of `dtype`, and so is the weight, unless it is int8."""
    out_features, in_features, gap = LINEAR_CASES[name]
    weight, scale = torch.randn(out_features, in_features + gap, device=device).to(dtype), None
    if int8:
        weight = torch.randint(-127, 128, weight.shape, dtype=torch.int8, device=device)
        scale = (torch.rand(out_features, device=device) + 0.1).to(dtype)
    weight, x = weight[:, :in_features], torch.randn(1, 1, in_features, device=device).to(dtype)
    y = single_row_linear(x, weight, scale)
    assert y.shape == (1, 1, out_features) and y.dtype == dtype
    expected = x.double() @ weight.double().t()
    return relative_error(y, expected if scale is None else expected * scale.double())


def dequantize_differences(dequantize_int8, name: str, dtype: torch.dtype, device: str) -> int:
    """How many numbers differ from torch's."""
    num_rows, num_columns, gap = DEQUANTIZE_CASES[name]
    weight = torch.randint(-127, 128, (num_rows, num_columns + gap), dtype=torch.int8, device=device)[:, :num_columns]
    scale = torch.rand(num_rows, device=device) + 0.1
    result = dequantize_int8(weight, scale, dtype)
    assert result.shape == weight.shape and result.dtype == dtype
    return int((result != (weight.float() * scale.unsqueeze(1)).to(dtype)).sum())


def attention_error(attend_cache, name: str, dtype: torch.dtype, device: str) -> float:
    """The query is a slice of a fused projection, and the keys and values are a slice of a longer cache.

    Cache positions from kv_len on are NaN.
    """
    kv_len, positions, num_heads, num_kv_heads, d = ATTENTION_CASES[name]
    batch, kv_len, scaling = len(kv_len), torch.tensor(kv_len, device=device), 0.7 * d**-0.5
    query = torch.randn(batch, num_heads + 2, d, device=device).to(dtype)[:, 1:-1]
    cache_shape = batch, positions + 5, num_kv_heads, d
    keys, values = (torch.randn(cache_shape, device=device).to(dtype)[:, :positions] for _ in "kv")
    masked = torch.arange(positions, device=device) >= kv_len.unsqueeze(1)
    keys[masked] = values[masked] = torch.nan
    output = attend_cache(query, keys, values, kv_len, scaling)
    assert output.shape == (batch, num_heads, d) and output.dtype == dtype
    group_size = num_heads // num_kv_heads
    keys, values = (x.nan_to_num().double().repeat_interleave(group_size, dim=2) for x in (keys, values))
    scores = torch.einsum("bhd,blhd->bhl", query.double(), keys) * scaling
    weights = scores.masked_fill(masked.unsqueeze(1), -torch.inf).softmax(-1)
    return relative_error(output, torch.einsum("bhl,blhd->bhd", weights, values))


def error_messages(attend_cache) -> list[str]:
    """Of caches with a wrong batch size, a number of heads that does not divide, and a wrong head dimension."""
    messages = []
    for wrong in ((3, 9, 2, 8), (2, 9, 3, 8), (2, 9, 2, 16)):
        try:
            attend_cache(torch.randn(2, 4, 8), *torch.randn(2, *wrong), torch.tensor([3, 9]), 0.3)
        except ValueError as error:
            messages.append(str(error))
    return messages


def main() -> None:
    from minigpt4.kernels.decoding import attend_cache, single_row_linear
    from minigpt4.kernels.int8 import dequantize_int8

    torch.manual_seed(0)
    # New memory holds NaN, so that elements which a kernel does not write are noticed.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    errors = {}
    for name, dtype in dtypes_of(LINEAR_CASES):
        errors[f"{name}, {dtype}"] = linear_error(single_row_linear, name, DTYPES[dtype], "cpu")
        errors[f"{name}, int8 and {dtype}"] = linear_error(single_row_linear, name, DTYPES[dtype], "cpu", int8=True)
    for name, dtype in dtypes_of(ATTENTION_CASES):
        errors[f"{name}, {dtype}"] = attention_error(attend_cache, name, DTYPES[dtype], "cpu")
    # Not bfloat16: the interpreter truncates where a GPU rounds.
    differences = sum(
        dequantize_differences(dequantize_int8, name, dtype, "cpu")
        for dtype in (torch.float32, torch.float16)
        for name in DEQUANTIZE_CASES
    )
    x, weight, keys = torch.randn(1, 8), torch.randn(6, 8), torch.randn(2, 9, 2, 8)
    torch.library.opcheck(single_row_linear, (x, weight))
    torch.library.opcheck(single_row_linear, (x, weight.to(torch.int8), torch.rand(6)))
    torch.library.opcheck(attend_cache, (torch.randn(2, 4, 8), keys, keys, torch.tensor([3, 9]), 0.3))
    messages = error_messages(attend_cache)
    print(json.dumps({"errors": errors, "error messages": messages, "dequantize differences": differences}))


if __name__ == "__main__":
    main()
