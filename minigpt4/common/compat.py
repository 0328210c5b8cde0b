"""Every private name of a library that this project relies on, in one place.

Private names may go with any release. Each function below says which library it is about, with which versions it was
tried, how one would notice that it broke, and what to do when the name goes. Bounds of the tried versions are in
requirements.txt. `fast/self_check.py` compares the fast paths with the library's own computation at the start of a run,
so that a change of meaning, which no error shows, switches them off.

Tried: torch 2.11 and 2.14, transformers 5.17 and 5.23, timm 1.0.21 to 1.0.31, bitsandbytes 0.48 to 0.50.
The libraries are imported inside the functions.
"""

from typing import Any

# torch


def raise_recompile_limit(limit: int) -> None:
    """Let torch.compile make at least `limit` versions of one function, in the thread that calls this.

    All layers share one code object, with and without gradients. At the default limit of 8 torch warns of
    "recompile_limit reached" and runs the rest uncompiled. Without the setting: give each kind of layer its own
    function.
    """
    import torch

    if torch._dynamo.config.recompile_limit < limit:
        torch._dynamo.config.recompile_limit = limit


def choose_kernels_for(tensor: Any, dim: int, size: int) -> None:
    """Let torch.compile choose kernels as if a dimension, which changes from call to call, had this size.

    `mark_dynamic` is documented, its `hint_override` (torch 2.10 and later) hardly. Without it, compiling raises a
    TypeError. Then: compile with a batch of that size before the first one.
    """
    import torch

    torch._dynamo.mark_dynamic(tensor, dim, hint_override=size)


def may_be_dynamic(tensor: Any, dim: int) -> None:
    """Tell torch.compile that a dimension changes from call to call.

    Otherwise each longer cache is compiled anew. The public `torch._dynamo.mark_dynamic` raises where the size is found
    to be fixed; it could serve if this one goes.
    """
    import torch

    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def scaled_mm(a: Any, b: Any, scale_a: Any, scale_b: Any, bias: Any = None) -> Any:
    """a [M,K] times b [K,N], both e4m3, with scales by rows [M,1] and columns [1,N]: [M,N] bfloat16.

    torch.nn.functional.scaled_mm is to take its place; torch 2.11 has none that takes scales by rows. Partial sums stay
    in the tensor cores (`use_fast_accum`), as in torchao's row-wise recipe.
    """
    import torch

    return torch._scaled_mm(a, b, scale_a, scale_b, bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True)


def linear_gelu_cuda(bias: Any, x: Any, weight: Any) -> Any:
    """GELU (tanh form) of x [M,K] times weight [N,K] plus bias [N], by cuBLASLt's epilogue: [M,N].

    There is no public function for it. If it goes: F.gelu(F.linear(x, weight, bias)), which is slower.
    """
    import torch

    return torch.ops.aten._addmm_activation(bias, x, weight.t(), use_gelu=True)


def version(tensor: Any) -> int | None:
    """How often a tensor was changed in place; None for inference tensors, which do not count.

    If it goes: compare a checksum of the weights, or require callers to say that weights have changed.
    """
    return None if tensor.is_inference() else tensor._version


def recomputed(layer: Any, preserve_rng_state: bool = False) -> Any:
    """A layer that recomputes its activations in the backward pass, under the same parameter names.

    preserve_rng_state: for a layer that draws random numbers.

    torch documents the wrapper for FSDP only by example. If it goes: a module of our own around
    torch.utils.checkpoint, with hooks that keep the names of the state dict.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(layer, preserve_rng_state=preserve_rng_state)


def without_recomputation(layer: Any) -> Any:
    """The layer inside `recomputed`, or the layer itself.

    If the attribute is renamed, models with recomputed layers fail at the start of a run. It goes with `recomputed`.
    """
    return getattr(layer, "_checkpoint_wrapped_module", layer)


def name_in_state_dict(name: str) -> str:
    """A parameter's name in the state dict, which does not show `recomputed`, from that in `named_parameters`."""
    return name.replace("_checkpoint_wrapped_module.", "")


# transformers


def attention_implementation(config: Any) -> str:
    """Name of the attention function that a model's config chooses.

    The setter `set_attn_implementation` is public, a getter is not. If it is renamed, the start of a run fails with an
    AttributeError. Without it: set the implementation when the model is loaded, and remember it.
    """
    return config._attn_implementation


def set_attention_implementation(config: Any, name: str) -> None:
    """Choose the attention function in a config.

    `set_attn_implementation` of the model is public, and used where it serves. It checks names against a list that our
    function for decoding is not meant for. If the name goes, compiled steps differ from the library's, and decoding
    says that it goes on without them. Then: the public setter.
    """
    config._attn_implementation = name


def calls_registered_attention(llm: Any) -> bool:
    """Whether a model's layers call the attention function that is registered under the config's name.

    A model that does not would ignore ours, and packed sequences would attend to each other. If the flag goes, no batch
    is packed. Then: leave the question to the self-check.
    """
    return getattr(llm, "_supports_attention_backend", False)


def attends_to_all_before(config: Any) -> bool:
    """Whether every layer attends to all earlier tokens, and nothing else (no window, no recurrence) mixes tokens.

    transformers' cache has a layer of a type of its own for each other kind. If the types go: read `layer_types` and
    `sliding_window` of the config.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def decoder_layers(llm: Any) -> Any:
    """The ModuleList of a language model's decoder layers: the first list of `num_hidden_layers` modules.

    Models name the list differently (`layers`, `h`, `blocks`); `get_decoder().layers` covers most, not all. Nothing
    here is private, but how models are built is not documented. Where no list fits, StopIteration: the self-checks then
    switch the fast paths off.
    """
    from torch import nn

    count = llm.config.get_text_config().num_hidden_layers
    lists = (part for part in llm.modules() if isinstance(part, nn.ModuleList))
    return next(part for part in lists if len(part) == count)


def gguf_processor(architecture: str, config: Any) -> Any | None:
    """transformers' own treatment of the tensors of a .gguf file: transpositions, permutations, joined experts.

    None: transformers has none for the architecture, or the name is gone. Then its public `from_pretrained` with
    `gguf_file` reads the file, which takes half a minute for 135 M parameters.
    """
    try:
        from transformers import modeling_gguf_pytorch_utils as theirs

        if architecture in theirs.TENSOR_PROCESSORS or architecture in theirs.GGUF_SUPPORTED_ARCHITECTURES:
            return theirs.TENSOR_PROCESSORS.get(architecture, theirs.TensorProcessor)(config=config.to_dict())
    except (ImportError, AttributeError):
        pass
    return None


# timm


def add_positions(vit: Any, patches: Any) -> Any:
    """Patch embeddings [B,G*G,D] to image tokens [B,1+G*G,D]: timm's class token and positions.

    If it goes, the self-check switches the fused encoder off. Then: add `cls_token` and `pos_embed`, which are public.
    """
    return vit._pos_embed(patches)[0]


def call_qkv_layer(attention: Any) -> None:
    """Make timm's attention call its qkv layer, rather than take the layer's weight for a product of its own.

    A layer in fp8 would be bypassed otherwise. `qkv_bias_separate` is an argument of timm's constructor.
    If it goes, the log counts fewer layers in fp8 than blocks need. Then: pass it to the constructor.
    """
    attention.qkv_bias_separate = True


# bitsandbytes


def is_from_bitsandbytes(layer: Any) -> bool:
    """Whether a layer is one of bitsandbytes' own. It is not imported for the question.

    If the package is renamed, its layers would be compiled, which fails at the first step.
    """
    return type(layer).__module__.partition(".")[0] == "bitsandbytes"


def silence_bitsandbytes() -> None:
    """Hide two warnings that do not concern this project's use.

    On import it misses a CPU kernel that is not used here. Its 8-bit layers, where they are kept, warn in every step of
    a run that does not compute in float16. If the loggers are renamed, the warnings are shown again.
    """
    import logging

    for name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
        logging.getLogger(name).setLevel(logging.ERROR)


def int8_weights(layer: Any) -> tuple[Any, Any] | None:
    """Of a Linear8bitLt: the weights [N,K] int8, and the largest magnitude of each row [N]; None: not quantised yet.

    bitsandbytes moves them from the parameter to the layer's state at the first call. If an attribute is renamed,
    loading in 8 bit fails with an AttributeError. Then: quantise the weights by `quantization/int8.py`.
    """
    holder = layer.weight if layer.state.CB is None else layer.state
    return None if holder.CB is None else (holder.CB, holder.SCB)


def keep_4bit_weights(layer: Any) -> None:
    """Keep a 4-bit layer from repacking its weights on a CPU with AVX512-BF16 at the first pass without gradients.

    Gradients are wrong from then on (bitsandbytes 0.50).
    """
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False


def dequantize_4bit(weight: Any, scale: Any, block: int, kind: str, shape: list[int], dtype: Any) -> Any:
    """4-bit weights in a 16- or 32-bit type [N,K]. The registered operator is not part of the documented interface."""
    import torch

    return torch.ops.bitsandbytes.dequantize_4bit(weight, scale, block, kind, shape, dtype)


def gemv_4bit(x: Any, weight: Any, shape: list[int], scale: Any, code: Any, block: int) -> Any:
    """A single row x [...,K] times 4-bit weights of `shape` [N,K], dequantised as they are read: [...,N].

    Registered like `dequantize_4bit`; that and a product can take its place, at half the speed.
    """
    import torch

    return torch.ops.bitsandbytes.gemv_4bit(x, weight, shape, scale, code, block)
