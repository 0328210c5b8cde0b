"""The kernels that torch.compile chooses for a decoder layer on a GPU, found without one: argv KIND LENGTH…

For `tests/fast/test_same_kernels.py`. KIND: "16bit", "fp8", or "lora" with adapters in all linear layers. A line for
each length has the kernels that are chosen if a micro-batch of so many tokens is compiled first. Nothing is computed:
the compiler takes the CPU for an H200, and its kernels are described instead of being built.
"""

import hashlib
import json
import re
import sys
from types import SimpleNamespace

import torch
import torch._inductor.config
import triton
from torch._inductor.async_compile import AsyncCompile, _load_triton_kernel_from_source
from torch._inductor.runtime import triton_heuristics
from torch._inductor.runtime.hints import DeviceProperties
from transformers import LlamaConfig, LlamaForCausalLM
from triton.backends.compiler import GPUTarget

from minigpt4.fast import llama
from minigpt4.fast.attention import Segments, allow_packing
from minigpt4.fast.fused_linear import fuse_projections
from minigpt4.fast.training_step import convert_to_fp8

D = 4096  # the width: torch.compile adds up short rows in one way only
SIZES = {"hidden_size": D, "intermediate_size": 1024, "num_hidden_layers": 1, "num_attention_heads": 32}


class Chosen(Exception):
    """A function is compiled, forward and backward: its first kernel was called."""


def pretend_gpu(chosen: list[str]) -> None:
    """Make torch.compile choose kernels of an H200 for tensors of the CPU, and append a description of each."""
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0))
    h200 = {"multi_processor_count": 132, "cc": 90, "major": 9, "warp_size": 32}
    h200 |= {"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048}
    DeviceProperties.create = classmethod(lambda cls, device: cls(type="cuda", index=0, **h200))
    torch._inductor.config.cpu_backend = "triton"
    torch._inductor.config.force_disable_caches = True
    descriptions, configs_found = {}, []

    def keep_configs(size_hints, configs, *args, **kwargs):
        configs_found.extend(map(str, configs))
        return lambda function: None

    def describe(self, name: str, source: str, device_str: str = "cuda"):
        if source not in descriptions:
            configs_found.clear()
            _load_triton_kernel_from_source(name, source)
            code = re.sub(r"size_hints=\{.*?\}", "", source)
            descriptions[source] = f"{name} {hashlib.sha256(code.encode()).hexdigest()[:8]} {sorted(configs_found)}"
        chosen.append(descriptions[source])
        return SimpleNamespace(run=stop)

    def stop(*args, **kwargs):
        raise Chosen

    triton_heuristics.cached_autotune, AsyncCompile.triton = keep_configs, describe


def decoder(kind: str) -> LlamaForCausalLM:
    """A Llama of one layer, as a training step has it."""
    llm = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=64)).to(torch.bfloat16).requires_grad_(False)
    assert allow_packing(llm)
    assert fuse_projections(llm)
    if kind == "fp8":
        convert_to_fp8(llm)
    elif kind == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        inject_adapter_in_model(LoraConfig(r=8, lora_dropout=0.0, target_modules="all-linear"), llm)
    return llm


def call(fused: llama.FusedLlama, kind: str, length: int) -> None:
    """Call the two functions of the layer with a micro-batch of `length` tokens."""
    layer = fused.llm.model.layers[0]
    hidden, addend, attended = (torch.zeros(1, length, D, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    rotation = torch.zeros(length, 64), torch.zeros(length, 64)
    segments = Segments(torch.zeros(5, dtype=torch.int32), 2, length)
    for function, args in (
        (fused.pre_attention, (hidden, addend, rotation, segments, kind == "lora")),
        (fused.post_attention, (hidden, attended)),
    ):
        try:
            function(layer, llama.adapters_of(layer, {}), *args)
        except Chosen:
            continue
        raise AssertionError(f"{function} was not compiled.")


def main(kind: str, lengths: list[str]) -> None:
    chosen: list[str] = []
    pretend_gpu(chosen)
    llama.use_triton = lambda x: True
    llm = decoder(kind)
    for length in map(int, lengths):
        torch._dynamo.reset()
        chosen.clear()
        fused = llama.FusedLlama(llm, compiled=True)
        call(fused, kind, length)
        kernels, count = sorted(set(chosen)), len(chosen)
        call(fused, kind, length + 100)
        print(json.dumps({"kernels": kernels, "compiled again": chosen[count:]}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
