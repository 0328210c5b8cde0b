"""The kernels of a training step against float64, on the GPU or, as a script, interpreted.

    TRITON_INTERPRET=1 python tests/training_cases.py

prints a JSON object: the relative errors of output and gradient, for each of CASES (attention, with heads as they are
and rotated) and SILU_PRODUCTS, and for a small Llama.
"""

import json
from itertools import accumulate, pairwise

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt4.fast.attention import allow_packing
from minigpt4.fast.fused_linear import FirstOfFused, fuse_projections
from minigpt4.fast.packing.batch import LONGEST_MULTIPLE, pack
from minigpt4.fast.packing.binning import round_up
from minigpt4.models.prompt import IGNORE_INDEX, IMAGE_ID
from minigpt4.quantization.bitsandbytes import LowBitFirstOfFused, fuse

# Lengths of the ranges after the first, rows shared, heads of queries, of keys and values, dimensions.
CASES = {
    "one block each": ([5, 64, 33], 0, 2, 2, 64),
    "a shared row": ([40, 63, 51, 20], 1, 2, 2, 128),
    "a shared row makes a second block": ([64, 64, 10], 1, 2, 2, 64),
    "several blocks": ([150, 3, 129], 20, 2, 2, 64),
    "empty ranges, no fill": ([0, 40, 0, 150, 0], 1, 2, 2, 64),
    "empty ranges, more shared than a block": ([0, 70, 33, 0], 100, 2, 2, 64),
    "all ranges but the first empty": ([0, 0], 9, 2, 2, 64),
    "grouped heads": ([40, 150], 20, 6, 2, 64),
    "one head of keys": ([20, 70], 1, 4, 1, 64),
    "a head that is no power of two": ([30, 150], 20, 2, 2, 24),
    "a narrow head": ([30, 70], 5, 2, 2, 8),
    "a wide head": ([30, 50], 5, 2, 1, 256),
    "many heads": ([5, 3, 7], 2, 40, 4, 12),
}


def lengths_to_starts(lengths: list[int], shared: int, device: str) -> tuple[torch.Tensor, int]:
    """What the kernels are told: the starts of the ranges, and a bound of the keys."""
    starts = torch.tensor([0, *accumulate([shared, *lengths])], dtype=torch.int32, device=device)
    return starts, round_up(max(lengths) + shared, LONGEST_MULTIPLE)


def inputs(rows: int, heads: int, groups: int, d: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Queries, keys and values [T,H+2G,d], and a gradient of the output."""
    qkv = torch.randn(rows, heads + 2 * groups, d, dtype=dtype, device=device, requires_grad=True)
    gradient = torch.randn(rows, heads, d, dtype=dtype, device=device)
    return [qkv, gradient]


def reference(qkv, groups: int, starts: torch.Tensor, shared: int, longest: int, scaling: float):
    """One range after the other, in float64."""
    qkv = qkv.double()
    q, k, v = qkv.split([qkv.shape[1] - 2 * groups, groups, groups], dim=1)
    k, v = (x.repeat_interleave(q.shape[1] // groups, dim=1) for x in (k, v))
    outs = []
    for number, (start, end) in enumerate(pairwise(starts.tolist())):
        before = shared if number else 0
        keys, values = (torch.cat([x[:before], x[start:end]]) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[start:end], keys) * scaling
        seen = torch.ones_like(scores, dtype=torch.bool).tril(before)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outs)


def errors(attention, qkv, gradient, groups: int, starts, shared: int, longest: int, true=reference):
    """Of the output and of the gradient of qkv, each relative to the norm of the true one."""
    arguments = (qkv, groups, starts, shared, longest, 0.7 * qkv.shape[-1] ** -0.5)
    output, expected = attention(*arguments), true(*arguments)
    results = output, torch.autograd.grad(output, qkv, gradient)[0]
    truths = expected, torch.autograd.grad(expected, qkv, gradient.double())[0]
    assert all(result.dtype == qkv.dtype for result in results)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, truths, strict=True)]


def case_errors(attention, name: str, dtype: torch.dtype, device: str) -> list[float]:
    lengths, shared, heads, groups, d = CASES[name]
    starts, longest = lengths_to_starts(lengths, shared, device)
    return errors(attention, *inputs(int(starts[-1]), heads, groups, d, dtype, device), groups, starts, shared, longest)


def rotated_case_errors(
    rotated_attention, name: str, dtype: torch.dtype, device: str, int8: bool = False
) -> list[float]:
    """`case_errors` of heads that are a product, and rotated first. Keys and values of shared rows get no gradient.

    int8: the product's weights are in 8 bit.
    """
    lengths, shared, heads, groups, d = CASES[name]
    starts, longest = lengths_to_starts(lengths, shared, device)
    qkv, gradient = inputs(int(starts[-1]), heads, groups, d, dtype, device)
    x = torch.randn(len(qkv), 40, dtype=dtype, device=device, requires_grad=True)
    angles = torch.rand(len(x), d // 2, device=device) * 7
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    joint = LowBitFirstOfFused(1, 1) if int8 else FirstOfFused(1, 1)
    weight = joint.joint_weight = torch.randn(qkv[0].numel(), 40, dtype=dtype, device=device) / 40**0.5
    if int8:
        joint.joint_weight = (weight * 100).to(torch.int8)
        joint.joint_scale = torch.rand(len(weight), device=device) / 100
        weight = joint.joint_weight.double() * joint.joint_scale.double().unsqueeze(1)

    def rotated(x, groups, *others):
        return rotated_attention(x, joint, d, groups, cos, sin, *others)

    def true(x, *others):
        product = (x.double() @ weight.double().t()).view(qkv.shape)
        keys_and_values = torch.cat([product[:shared, heads:].detach(), product[shared:, heads:]])
        product = torch.cat([product[:, :heads], keys_and_values], dim=1)
        return reference(rotate(product, cos.double(), sin.double(), heads + groups), *others)

    return errors(rotated, x, gradient, groups, starts, shared, longest, true)


def fused_llama_errors(int8: bool = False) -> list[float]:
    """Of logits, and of the gradient of embeddings behind the shared ones, by the kernels beside transformers'.

    int8: both with weights in 8 bit.
    """
    from minigpt4.fast import llama as fast_llama
    from minigpt4.quantization.int8 import quantize

    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    llm = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).requires_grad_(False)
    allow_packing(llm)
    if int8:
        quantize(llm, torch.device("cpu"))
    assert (fuse if int8 else fuse_projections)(llm) == 4
    sequences = [[1, 2, IMAGE_ID, *range(3, 9)], [1, 2, IMAGE_ID, *range(3, 5)]]
    (piece,) = pack(sequences, [[IGNORE_INDEX] * 3 + ids[3:] for ids in sequences], 1024).micro_batches
    embeds = torch.randn(1, piece.sizes.tokens, 32, requires_grad=True)
    labelled, shared = piece.targets[0] != IGNORE_INDEX, piece.sizes.shared
    assert shared == 2

    def results(predict):
        logits = predict(embeds, piece)[0, labelled]
        return logits, torch.autograd.grad(logits.square().sum(), embeds)[0][:, shared:]

    expected = results(lambda embeds, piece: llm(inputs_embeds=embeds, **piece.llm_inputs()).logits)
    usual, fast_llama.use_triton = fast_llama.use_triton, lambda x: True
    own = results(fast_llama.FusedLlama(llm, compiled=False))
    fast_llama.use_triton = usual
    return [((a - b).norm() / b.norm()).item() for a, b in zip(own, expected, strict=True)]


def rotate(qkv, cos, sin, turned: int) -> torch.Tensor:
    (first, second), cos, sin = qkv[:, :turned].chunk(2, dim=-1), cos.unsqueeze(1), sin.unsqueeze(1)
    halves = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([torch.cat(halves, dim=-1), qkv[:, turned:]], dim=1)


def silu_product(gate_up) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


# Shapes of its input.
SILU_PRODUCTS = {"silu_product": (6, 2 * 1500), "silu_product of one column": (1, 2)}


def silu_product_errors(name: str, dtype: torch.dtype, device: str) -> list[float]:
    """Of the output and of the gradient."""
    from minigpt4.kernels import llama as llama_kernels

    gate_up = torch.randn(SILU_PRODUCTS[name], dtype=dtype, device=device, requires_grad=True)
    output, expected = llama_kernels.silu_product(gate_up), silu_product(gate_up.double())
    gradient = torch.randn_like(output)
    results = output, *torch.autograd.grad(output, gate_up, gradient)
    truths = expected, *torch.autograd.grad(expected, gate_up, gradient.double())
    assert all(result.dtype == dtype for result in results)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(results, truths, strict=True)]


def main() -> None:
    from minigpt4.fast import rope_attention
    from minigpt4.kernels import llama as llama_kernels
    from minigpt4.kernels import packed_attention
    from minigpt4.quantization import fp8, fp8_rounding

    torch.manual_seed(0)
    # New memory holds NaN: what the kernels leave out would show.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    attention = packed_attention.attention
    results = {name: case_errors(attention, name, torch.float32, "cpu") for name in CASES}
    results["float16"] = case_errors(attention, "several blocks", torch.float16, "cpu")
    starts, longest = lengths_to_starts([4, 70], 2, "cpu")
    qkv, _ = inputs(76, 2, 1, 16, torch.float32, "cpu")
    torch.library.opcheck(packed_attention.attention_and_denominators, (qkv, 1, starts, 2, longest, 0.25))
    qkv, angles, only = qkv.detach(), torch.rand(2, 76, 8), ("test_schema", "test_faketensor")
    factors = [qkv.flatten(1), torch.eye(64)]
    torch.library.opcheck(rope_attention._rotated_product, (factors, *angles, 16, 1), test_utils=only)
    rounded, scale = fp8_rounding.quantize_rows(qkv.flatten(1))
    fp8.product = lambda rounded, weight, scale: (
        rounded[0].bfloat16() @ weight.bfloat16().t()
    )  # not in all torches' CPUs
    factors = [rounded, scale, *fp8_rounding.quantize_rows(torch.eye(64))]
    torch.library.opcheck(rope_attention._rotated_product, (factors, *angles, 16, 1), test_utils=only[1])
    out, lse = packed_attention.attention_and_denominators(qkv, 1, starts, 2, longest, 0.25)
    backward = torch.randn_like(out), qkv, 1, out, lse, starts, 2, longest, 0.25, *angles, False
    torch.library.opcheck(rope_attention._gradient, backward, test_utils=only)
    torch.library.opcheck(rope_attention._gradient, (*backward[:-1], True), test_utils=only[1])
    torch.library.opcheck(llama_kernels.silu_product, (torch.randn(3, 8, requires_grad=True),))
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    results["compiled"] = case_errors(compiled, "grouped heads", torch.float32, "cpu")
    rotated = rope_attention.rotated_attention
    results |= {f"rotated, {name}": rotated_case_errors(rotated, name, torch.float32, "cpu") for name in CASES}
    compiled = torch.compile(rotated, backend="aot_eager", fullgraph=True, dynamic=True)
    results["rotated, compiled"] = rotated_case_errors(compiled, "grouped heads", torch.float32, "cpu")
    results["rotated, 8 bit"] = rotated_case_errors(rotated, "grouped heads", torch.float32, "cpu", int8=True)
    results["fused llama"], results["fused llama, 8 bit"] = fused_llama_errors(), fused_llama_errors(int8=True)
    results |= {name: silu_product_errors(name, torch.float32, "cpu") for name in SILU_PRODUCTS}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
