"""The kernels of decoding against sums in float64, on the GPU or, as a script, interpreted.

    TRITON_INTERPRET=1 python tests/decoding_cases.py

prints a JSON object: the relative error of each of PRODUCTS and ATTENTIONS, in each of TYPES.
"""

import itertools
import json

import torch

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Outputs, inputs, and how many elements lie between the rows of the weight.
PRODUCTS = {
    "one output of one input": (1, 1, 0),
    "odd": (5, 7, 0),
    "a row of the weight in one piece": (64, 128, 0),
    "one output more": (65, 128, 0),
    "several pieces": (6, 4096, 0),
    "several pieces and one input more": (6, 4097, 0),
    "so many inputs that a program has fewer rows": (7, 11008, 0),
    "rows that lie apart": (12, 96, 32),
}
# Rows, inputs, and how many elements lie between the rows of an 8-bit weight.
TURNED = {
    "one": (1, 1, 0),
    "odd": (5, 7, 0),
    "a program and one column more": (3, 4097, 0),
    "rows that lie apart": (6, 96, 32),
}
# What each row sees, slots, heads of queries, of keys and values, dimensions.
ATTENTIONS = {
    "one slot": ([1], 1, 2, 2, 64),
    "one of many": ([1], 300, 2, 2, 128),
    "a block": ([128], 300, 2, 2, 128),
    "one slot more than a block": ([129], 300, 2, 2, 128),
    "all slots": ([300], 300, 2, 2, 128),
    "each row for itself": ([300, 1, 77, 250], 300, 2, 2, 128),
    "grouped heads": ([40, 150], 160, 6, 2, 64),
    "one head of keys": ([20, 70], 70, 4, 1, 64),
    "a head that is no power of two": ([200], 210, 4, 2, 80),
    "a narrow head": ([30, 70], 96, 2, 2, 8),
    "a wide head": ([300], 320, 2, 1, 256),
    "so many programs that each is narrower": ([3, 70] * 16, 80, 9, 3, 16),
}


def error(result: torch.Tensor, truth: torch.Tensor) -> float:
    return ((result.double() - truth).norm() / truth.norm()).item()


def product_error(row_product, name: str, dtype: torch.dtype, device: str, int8: bool = False) -> float:
    """x is in `dtype`, and the weight too, or in int8."""
    outputs, inputs, apart = PRODUCTS[name]
    weight, scale = torch.randn(outputs, inputs + apart, device=device).to(dtype), None
    if int8:
        weight = torch.randint(-127, 128, weight.shape, dtype=torch.int8, device=device)
        scale = (torch.rand(outputs, device=device) + 0.1).to(dtype)
    weight, x = weight[:, :inputs], torch.randn(1, 1, inputs, device=device).to(dtype)
    y = row_product(x, weight, scale)
    assert y.shape == (1, 1, outputs) and y.dtype == dtype
    truth = x.double() @ weight.double().t()
    return error(y, truth if scale is None else truth * scale.double())


def turned_back_differs(turned_back, name: str, dtype: torch.dtype, device: str) -> int:
    """How many numbers are another than torch gives."""
    rows, width, apart = TURNED[name]
    weight = torch.randint(-127, 128, (rows, width + apart), dtype=torch.int8, device=device)[:, :width]
    scale = torch.rand(rows, device=device) + 0.1
    result = turned_back(weight, scale, dtype)
    assert result.shape == weight.shape and result.dtype == dtype
    return int((result != (weight.float() * scale.unsqueeze(1)).to(dtype)).sum())


def attention_error(attend_slots, name: str, dtype: torch.dtype, device: str) -> float:
    """Queries as a part of a joint projection, keys and values of which more slots lie in memory than are given.

    KVCache that are not seen are NaN.
    """
    seen, slots, heads, groups, d = ATTENTIONS[name]
    seen, scaling = torch.tensor(seen, device=device), 0.7 * d**-0.5
    query = torch.randn(len(seen), heads + 2, d, device=device).to(dtype)[:, 1:-1]
    keys, values = (torch.randn(len(seen), slots + 5, groups, d, device=device).to(dtype)[:, :slots] for _ in "kv")
    unseen = torch.arange(slots, device=device) >= seen.unsqueeze(1)
    keys[unseen] = values[unseen] = torch.nan
    output = attend_slots(query, keys, values, seen, scaling)
    assert output.shape == (len(seen), heads, d) and output.dtype == dtype
    repeated = (x.nan_to_num().double().repeat_interleave(heads // groups, dim=2) for x in (keys, values))
    keys, values = repeated
    scores = torch.einsum("bhd,blhd->bhl", query.double(), keys) * scaling
    weights = scores.masked_fill(unseen.unsqueeze(1), -torch.inf).softmax(-1)
    return error(output, torch.einsum("bhl,blhd->bhd", weights, values))


def main() -> None:
    from minigpt4.kernels.decoding import attend_slots, row_product
    from minigpt4.kernels.int8 import turned_back

    torch.manual_seed(0)
    # New memory holds NaN: what the kernels leave out would show.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    results = {}
    for (dtype, kind), name in itertools.product(TYPES.items(), PRODUCTS):
        results[f"{name}, {dtype}"] = product_error(row_product, name, kind, "cpu")
        results[f"{name}, int8 and {dtype}"] = product_error(row_product, name, kind, "cpu", int8=True)
    for (dtype, kind), name in itertools.product(TYPES.items(), ATTENTIONS):
        results[f"{name}, {dtype}"] = attention_error(attend_slots, name, kind, "cpu")
    # The interpreter cuts numbers off to bfloat16 that a GPU rounds.
    exact = (torch.float32, torch.float16)
    differing = [turned_back_differs(turned_back, name, dtype, "cpu") for dtype in exact for name in TURNED]
    x, weight, keys = torch.randn(1, 8), torch.randn(6, 8), torch.randn(2, 9, 2, 8)
    torch.library.opcheck(row_product, (x, weight))
    torch.library.opcheck(row_product, (x, weight.to(torch.int8), torch.rand(6)))
    torch.library.opcheck(attend_slots, (torch.randn(2, 4, 8), keys, keys, torch.tensor([3, 9]), 0.3))
    refusals = []
    for wrong in ((3, 9, 2, 8), (2, 9, 3, 8), (2, 9, 2, 16)):
        try:
            attend_slots(torch.randn(2, 4, 8), *torch.randn(2, *wrong), torch.tensor([3, 9]), 0.3)
        except ValueError as refusal:
            refusals.append(str(refusal))
    print(json.dumps({"errors": results, "refusals": refusals, "turned back otherwise": sum(differing)}))


if __name__ == "__main__":
    main()
