"""Compare the kernels of a training step with float64, on a GPU, or as a script with Triton's interpreter.

    TRITON_INTERPRET=1 python tests/training_cases.py

prints a JSON object with the relative errors of output and gradient: for each of ATTENTION_CASES, for each of
ROPE_CASES with RoPE, for each of SILU_PRODUCT_CASES, and for a small Llama.
"""

import json
from itertools import accumulate, pairwise

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from minigpt4.fast.attention import allow_packing
from minigpt4.fast.fused_linear import fuse_projections
from minigpt4.fast.packing.batch import KV_LEN_MULTIPLE, pack
from minigpt4.fast.packing.binning import round_up
from minigpt4.models.prompt import IGNORE_INDEX, IMAGE_ID
from minigpt4.quantization.bitsandbytes import LowBitLinear

# Lengths of the sequences after the prefix, length of the prefix, query heads, key/value heads, dimensions of a head.
ATTENTION_CASES = {
    "one block each": ([5, 64, 33], 0, 2, 2, 64),
    "a prefix of one token": ([40, 63, 51, 20], 1, 2, 2, 128),
    "a prefix that makes a second block": ([64, 64, 10], 1, 2, 2, 64),
    "several blocks": ([150, 3, 129], 20, 2, 2, 64),
    "empty sequences": ([0, 40, 0, 150, 0], 1, 2, 2, 64),
    "empty sequences, a prefix of more than a block": ([0, 70, 33, 0], 100, 2, 2, 64),
    "all sequences empty": ([0, 0], 9, 2, 2, 64),
    "grouped heads": ([40, 150], 20, 6, 2, 64),
    "one head of keys": ([20, 70], 1, 4, 1, 64),
    "a head that is no power of two": ([30, 150], 20, 2, 2, 24),
    "a narrow head": ([30, 70], 5, 2, 2, 8),
    "a wide head": ([30, 50], 5, 2, 1, 256),
    "many heads": ([5, 3], 2, 32, 1, 12),
}
# Those of them in which RoPE, or the gradient without the prefix's, could go wrong by itself. A GPU tries all.
ROPE_CASES = (
    "a prefix that makes a second block",
    "empty sequences, a prefix of more than a block",
    "grouped heads",
    "a head that is no power of two",
    "many heads",
)

# Layers of a Llama that have adapters.
ADAPTED = {
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "q v": ("q_proj", "v_proj"),
    "o up": ("o_proj", "up_proj"),
}


def lengths_to_starts(lengths: list[int], prefix_len: int, device: str) -> tuple[torch.Tensor, int]:
    """The kernels' `starts` and `max_kv_len` for these sequences."""
    starts = torch.tensor([0, *accumulate([prefix_len, *lengths])], dtype=torch.int32, device=device)
    return starts, round_up(max(lengths) + prefix_len, KV_LEN_MULTIPLE)


def inputs(
    num_tokens: int, num_heads: int, num_kv_heads: int, d: int, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries, keys and values [T,H+2G,d], and a gradient of the output [T,H,d]."""
    qkv = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, d, dtype=dtype, device=device, requires_grad=True)
    return qkv, torch.randn(num_tokens, num_heads, d, dtype=dtype, device=device)


def reference(qkv, num_kv_heads: int, starts: torch.Tensor, prefix_len: int, max_kv_len: int, scaling: float):
    """One sequence after the other, in float64."""
    qkv = qkv.double()
    q, k, v = qkv.split([qkv.shape[1] - 2 * num_kv_heads, num_kv_heads, num_kv_heads], dim=1)
    k, v = (x.repeat_interleave(q.shape[1] // num_kv_heads, dim=1) for x in (k, v))
    outputs = []
    for number, (start, end) in enumerate(pairwise(starts.tolist())):
        before = prefix_len if number else 0
        keys, values = (torch.cat([x[:before], x[start:end]]) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[start:end], keys) * scaling
        causal = torch.ones_like(scores, dtype=torch.bool).tril(before)
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs)


def relative_errors(results, expected) -> list[float]:
    """Of each result, relative to the norm of the expected one. Infinity instead of NaN, which max() can pass over."""
    pairs = zip(results, expected, strict=True)
    return [((a.double() - b).norm() / b.norm()).nan_to_num(nan=torch.inf).item() for a, b in pairs]


def errors(
    attention, x, gradient, num_kv_heads: int, starts, prefix_len: int, max_kv_len: int, reference=reference
) -> list[float]:
    """Of the output, and of the gradient of x: heads [T,H+2G,d], or what `attention` computes them from."""
    arguments = (x, num_kv_heads, starts, prefix_len, max_kv_len, 0.7 * x.shape[-1] ** -0.5)
    output, expected = attention(*arguments), reference(*arguments)
    results = output, torch.autograd.grad(output, x, gradient)[0]
    assert all(result.dtype == x.dtype for result in results)
    return relative_errors(results, [expected, torch.autograd.grad(expected, x, gradient.double())[0]])


def case_errors(attention, name: str, dtype: torch.dtype, device: str) -> list[float]:
    lengths, prefix_len, num_heads, num_kv_heads, d = ATTENTION_CASES[name]
    starts, max_kv_len = lengths_to_starts(lengths, prefix_len, device)
    qkv, gradient = inputs(int(starts[-1]), num_heads, num_kv_heads, d, dtype, device)
    return errors(attention, qkv, gradient, num_kv_heads, starts, prefix_len, max_kv_len)


def rope_case_errors(
    rope_attention, name: str, dtype: torch.dtype, device: str, int8: bool = False, adapter: bool = False
) -> list[float]:
    """`case_errors` with the linear layer that computes the heads, and RoPE; x is the layer's input.

    int8: the linear layer has 8-bit weights. adapter: something is added to its output, and depends on x. Otherwise the
    prefix's keys and values get no gradient.
    """
    lengths, prefix_len, num_heads, num_kv_heads, d = ATTENTION_CASES[name]
    starts, max_kv_len = lengths_to_starts(lengths, prefix_len, device)
    qkv, gradient = inputs(int(starts[-1]), num_heads, num_kv_heads, d, dtype, device)
    x = torch.randn(len(qkv), 40, dtype=dtype, device=device, requires_grad=True)
    angles = torch.rand(len(x), d // 2, device=device) * 7
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    qkv_layer = nn.Linear(40, qkv[0].numel(), bias=False, dtype=dtype, device=device).requires_grad_(False)
    weight = qkv_layer.weight
    if int8:
        rounded, scale = (weight * 100).to(torch.int8), torch.rand(len(weight), device=device) / 100
        qkv_layer = LowBitLinear.replacing(qkv_layer, rounded, scale)
        weight = rounded.double() * scale.double().unsqueeze(1)
    delta = torch.randn(weight.shape, device=device).to(dtype) * 0.1

    def attention(x, num_kv_heads, *others):
        added = {"added": x @ delta.t(), "with_prefix_gradient": True} if adapter else {}
        return rope_attention(x, qkv_layer, d, num_kv_heads, cos, sin, *others, **added)

    def expected(x, *others):
        if adapter:
            heads = (x.double() @ (weight + delta).double().t()).view(qkv.shape)
            return reference(rotate(heads, cos.double(), sin.double(), num_heads + num_kv_heads), *others)
        heads = (x.double() @ weight.double().t()).view(qkv.shape)
        keys_and_values = torch.cat([heads[:prefix_len, num_heads:].detach(), heads[prefix_len:, num_heads:]])
        heads = torch.cat([heads[:, :num_heads], keys_and_values], dim=1)
        return reference(rotate(heads, cos.double(), sin.double(), num_heads + num_kv_heads), *others)

    return errors(attention, x, gradient, num_kv_heads, starts, prefix_len, max_kv_len, expected)


def fused_llama_errors(int8: bool = False, targets: tuple[str, ...] = ()) -> list[float]:
    """Of the logits, of the gradient of the embeddings after the prefix, and of those of adapters, compared with
    transformers and peft.

    int8: both have 8-bit weights. targets: the layers that have adapters.
    """
    from minigpt4.fast import llama as fast_llama
    from minigpt4.quantization.int8 import quantize_model

    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    llm = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).requires_grad_(False)
    allow_packing(llm)
    if int8:
        quantize_model(llm, torch.device("cpu"))
    if targets:
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=2, target_modules=list(targets)), llm)
    adapters = [p for name, p in llm.named_parameters() if ".lora_" in name]
    for parameter in adapters:
        torch.nn.init.normal_(parameter, std=0.2)
    assert fuse_projections(llm) == 4
    sequences = [[1, 2, IMAGE_ID, *range(3, 9)], [1, 2, IMAGE_ID, *range(3, 5)]]
    (micro_batch,) = pack(sequences, [[IGNORE_INDEX] * 3 + ids[3:] for ids in sequences], 1024).micro_batches
    embeds = torch.randn(1, micro_batch.sizes.tokens, 32, requires_grad=True)
    labelled, prefix_len = micro_batch.targets[0] != IGNORE_INDEX, micro_batch.sizes.prefix_len
    assert prefix_len == 2

    def results(predict):
        logits = predict(embeds, micro_batch)[0, labelled]
        of_embeds, *others = torch.autograd.grad(logits.square().sum(), [embeds, *adapters])
        return logits, of_embeds[:, prefix_len:], *others

    expected = results(lambda embeds, micro_batch: llm(inputs_embeds=embeds, **micro_batch.llm_inputs()).logits)
    usual, fast_llama.use_triton = fast_llama.use_triton, lambda x: True
    own = results(fast_llama.FusedLlama(llm, compiled=False))
    fast_llama.use_triton = usual
    return relative_errors(own, expected)


def rotate(qkv, cos, sin, num_heads: int) -> torch.Tensor:
    """The heads of qkv [T,H,d], with RoPE of the first `num_heads` by angles [T,d/2]."""
    (first, second), cos, sin = qkv[:, :num_heads].chunk(2, dim=-1), cos.unsqueeze(1), sin.unsqueeze(1)
    halves = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([torch.cat(halves, dim=-1), qkv[:, num_heads:]], dim=1)


def silu_product(gate_up) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


# Shapes of the input.
SILU_PRODUCT_CASES = {"silu_product": (6, 2 * 1500), "silu_product of one column": (1, 2)}


def silu_product_errors(name: str, dtype: torch.dtype, device: str) -> list[float]:
    """Of the output and of the gradient."""
    from minigpt4.kernels import llama as llama_kernels

    gate_up = torch.randn(SILU_PRODUCT_CASES[name], dtype=dtype, device=device, requires_grad=True)
    output, expected = llama_kernels.silu_product(gate_up), silu_product(gate_up.double())
    gradient = torch.randn_like(output)
    results = output, *torch.autograd.grad(output, gate_up, gradient)
    truths = expected, *torch.autograd.grad(expected, gate_up, gradient.double())
    assert all(result.dtype == dtype for result in results)
    return relative_errors(results, truths)


def packed_attention(*arguments) -> torch.Tensor:
    """The kernel's output, without the denominators."""
    from minigpt4.kernels.packed_attention import packed_attention_with_lse

    return packed_attention_with_lse(*arguments)[0]


def check_ops() -> None:
    """Check schemas, fake implementations and, where there are any, gradients of the custom ops."""
    from minigpt4.fast import rope_attention
    from minigpt4.kernels import llama as llama_kernels
    from minigpt4.kernels.packed_attention import packed_attention_with_lse
    from minigpt4.quantization import fp8_rounding

    opcheck, no_gradient = torch.library.opcheck, ("test_schema", "test_faketensor")
    starts, max_kv_len = lengths_to_starts([4, 7], 2, "cpu")
    sizes = (2, max_kv_len, 0.25)
    qkv, _ = inputs(13, 2, 1, 16, torch.float32, "cpu")
    opcheck(packed_attention_with_lse, (qkv, 1, starts, *sizes))
    qkv, angles = qkv.detach(), torch.rand(2, 13, 8)
    factors = [qkv.flatten(1), torch.eye(64)]
    opcheck(rope_attention.rope_product, (factors, *angles, 16, 1), test_utils=no_gradient)
    opcheck(rope_attention.rope_product, (factors, *angles, 16, 1, qkv.flatten(1)), test_utils=no_gradient)
    # Not every torch has this product for the CPU.
    rope_attention.fp8_matmul = lambda rounded, weight, scale: rounded[0].bfloat16() @ weight.bfloat16().t()
    factors = [*fp8_rounding.quantize_rows(qkv.flatten(1)), *fp8_rounding.quantize_rows(torch.eye(64))]
    opcheck(rope_attention.rope_product, (factors, *angles, 16, 1), test_utils="test_faketensor")
    out, lse = packed_attention_with_lse(qkv, 1, starts, *sizes)
    backward = torch.randn_like(out), qkv, 1, out, lse, starts, *sizes, *angles
    opcheck(rope_attention.rope_attention_backward, (*backward, False, True), test_utils=no_gradient)
    opcheck(rope_attention.rope_attention_backward, (*backward, True, False), test_utils="test_faketensor")
    opcheck(llama_kernels.silu_product, (torch.randn(3, 8, requires_grad=True),))


def main() -> None:
    from minigpt4.fast.rope_attention import rope_attention

    torch.manual_seed(0)
    # New memory holds NaN, so that elements which a kernel does not write are noticed.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    results = {name: case_errors(packed_attention, name, torch.float32, "cpu") for name in ATTENTION_CASES}
    results["float16"] = case_errors(packed_attention, "several blocks", torch.float16, "cpu")
    check_ops()
    compiled = torch.compile(packed_attention, backend="aot_eager", fullgraph=True)
    results["compiled"] = case_errors(compiled, "grouped heads", torch.float32, "cpu")
    for name in ROPE_CASES:
        results[f"rotated, {name}"] = rope_case_errors(rope_attention, name, torch.float32, "cpu")
    compiled = torch.compile(rope_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    results["rotated, compiled"] = rope_case_errors(compiled, "grouped heads", torch.float32, "cpu")
    adapted = rope_case_errors(compiled, "grouped heads", torch.float32, "cpu", adapter=True)
    results["rotated, with an adapter"] = adapted
    results["rotated, 8 bit"] = rope_case_errors(rope_attention, "grouped heads", torch.float32, "cpu", int8=True)
    results["fused llama"], results["fused llama, 8 bit"] = fused_llama_errors(), fused_llama_errors(int8=True)
    for name, targets in ADAPTED.items():
        results[f"fused llama, adapters: {name}"] = fused_llama_errors(targets=targets)
    results |= {name: silu_product_errors(name, torch.float32, "cpu") for name in SILU_PRODUCT_CASES}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
