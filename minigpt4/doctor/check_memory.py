"""How much memory a run takes, estimated from shapes alone.

Bytes on a GPU:

    weights      2 for each frozen parameter (16 bit); 1 or 0.5625 for those of the language model that 8 or 4 bit
                 shrink; 4 for trained ones, and for all on a CPU
    training     12 more for each trained parameter, in float32: the gradient and AdamW's two averages
    activations  kept for the backward pass of the language model, in 16 bit: for each token and layer, a multiple of
                 the model's width and of its feed-forward width; for each labelled token, a multiple of the vocabulary.
                 Of a packed batch, only those of the largest possible micro-batch (`fast/packing/batch.py`)
    the rest     a constant for workspaces, another for the memory that CUDA graphs reserve, and CUDA's own context

`ACTIVATIONS` holds the multiples, `GRAPHS` the constant for CUDA graphs. They come from three runs of `bench train` on
an H100 (S1/16, S1/64 and S2/12: Llama-7B with random weights, bfloat16, torch 2.11). docs/performance.md has other
states of the code, so these runs are not in its table. Peaks in MiB:

    eager        fitted to 19,168, 30,631 and 26,380 (`max_mem_MB`): padded batches, before layers were compiled
    compiled     fitted to 17,872, 26,056 and 23,109: the first compiled layers
    graphs       later runs of `rehearse` (7b, S1/16 and S2/12), with CUDA graphs and micro-batches: 17,786 and 18,959,
                 for which 19,321 and 20,475 were reserved (`gpu_GB`, `reserved_GB`); `GRAPHS` is about the difference

The estimate is within 1 % of the first two. It is 1 % above the reserved memory of the third at S1/16, and more at
S2/12: it assumes a micro-batch of 1,536 tokens, that run's had 1,024. When the computation of a step changes, measure
again and change the constants here.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from minigpt4.common.facts import tokens_per_micro_batch
from minigpt4.common.trained_parts import LORA, part_of
from minigpt4.doctor.diagnostic import WARNING, Diagnostic, error, ok, verdict, warning
from minigpt4.doctor.machine import MIB, Gpu, available_memory, readable
from minigpt4.doctor.run_context import RunContext

# 16-bit numbers that are kept for the backward pass, for each token and layer: multiples of the width of the model, and
# of that of its feed-forward layer.
ACTIVATIONS = {"eager": (8.2, 3), "compiled": (6.1, 2)}
LOGITS_BYTES = 10
"""For each labelled token and entry of the vocabulary: logits in 16 bit and float32, and their gradient."""
BYTES_PER_PARAMETER = {"16bit": 2.0, "8bit": 1.0, "8bit_weights": 1.0, "4bit": 0.5 + 4 / 64}
TRAINING_BYTES = 12
WORKSPACE = 200 * MIB
CONTEXT = 700 * MIB
GRAPHS = 1600 * MIB
# Bytes of host memory for a rank (libraries and CUDA), and for each data worker with its buffer of shuffled samples.
HOST_BASE, HOST_WORKER = 4.5e9, 0.9e9
# The relative error that an estimate may have.
TOLERANCE = 0.08


@dataclass(frozen=True)
class Memory:
    """Bytes on the device."""

    weights: float
    training: float
    activations: float
    graphs: float = 0

    @property
    def total(self) -> float:
        return self.weights + self.training + self.activations + self.graphs + WORKSPACE


def vision_parameters(context: RunContext) -> dict[str, int]:
    """Parameters of encoder (ln_vision included) and Q-Former (queries included). 0 where they are not loaded."""
    if not context.with_vision:
        return {"vit": 0, "qformer": 0}
    model = context.meta_model
    return {
        "vit": _numel(model.visual_encoder) + _numel(model.ln_vision),
        "qformer": _numel(model.Qformer) + model.query_tokens.numel(),
    }


def _numel(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def trainable_parameters(context: RunContext) -> int:
    """Parameters in a checkpoint. 0: the language model is not in a local folder."""
    if not context.llm:
        return 0
    model, trained = context.meta_model, context.trained_parts.names
    counts = {name: p.numel() for name, p in model.named_parameters() if part_of(name) in trained}
    if not context.with_vision:
        counts = {name: count for name, count in counts.items() if part_of(name) == "projector"}
    return sum(counts.values()) + (adapter_parameters(context) if LORA in trained else 0)


def adapter_parameters(context: RunContext) -> int:
    """Parameters of the LoRA adapters: A and B of each matrix."""
    return sum(context.trained_parts.lora.r * (outputs + inputs) for _, outputs, inputs in context.adapted_shapes)


def longest_sequence(context: RunContext) -> int:
    """Tokens of the longest sample: <s>, prompt, image, text."""
    from minigpt4.models.prompt import IMAGE_SLOT, encode_with_images
    from minigpt4.models.template import read_prompts

    model, template = context.model, context.template
    prompts = read_prompts(model.prompt_path, template.prompt) if model.prompt_path else [IMAGE_SLOT]
    prefixes = [encode_with_images(context.tokenizer, text, model.num_query_token, template.bos) for text in prompts]
    return max(map(len, prefixes)) + model.max_txt_len


def estimate(context: RunContext) -> Memory | None:
    """Memory of the device with the longest batch. None: the language model is not in a local folder."""
    llm = context.llm
    if not llm or context.tokenizer is None:
        return None
    sizes, trained = vision_parameters(context), trainable_parameters(context)
    quantizable, others = llm.parameter_counts()
    full = not context.on_gpu or not context.run.amp
    if full:
        weights = (quantizable + others) * (4 if context.load_in == "16bit" else 2)
    else:
        weights = quantizable * BYTES_PER_PARAMETER[context.load_in] + others * 2
    trained_names = context.trained_parts.names
    vit_bytes = 4 if full or context.model.vit_precision == "fp32" or "vit" in trained_names else 2
    qformer_bytes = 4 if full or "qformer" in trained_names else 2
    weights += sizes["vit"] * vit_bytes + sizes["qformer"] * qformer_bytes
    weights += (_numel(context.meta_model.llama_proj) + adapter_parameters(context)) * 4
    if not context.training:
        tokens = 2000  # a chat's context at most
        return Memory(weights, 0, tokens * llm.layers * llm.kv_width * 2 * (4 if full else 2))
    # CUDA graphs are captured of packed batches alone. Those of a small model are small.
    graphs = min(GRAPHS, weights) if compiles(context) and context.run.packed else 0
    return Memory(weights, trained * TRAINING_BYTES, _activations(context) * (2 if full else 1), graphs)


def compiles(context: RunContext) -> bool:
    return context.run.compile and context.on_gpu and context.run.amp


def _tokens_at_once(context: RunContext) -> int:
    """Tokens whose activations are kept at a time: of the largest micro-batch, or of the whole batch."""
    run, tokens = context.run, longest_sequence(context)
    whole_batch = run.batch_size_train * tokens
    if not (context.on_gpu and run.amp and run.packed and run.amp_dtype != "fp16"):
        return whole_batch
    most = tokens_per_micro_batch(run.fp8, min(gpu.total for gpu in context.gpus))
    return min(whole_batch, max(most, tokens))


def _activations(context: RunContext) -> float:
    llm, batch = context.llm, context.run.batch_size_train
    tokens = longest_sequence(context)
    at_once = _tokens_at_once(context)
    labels = context.model.max_txt_len * at_once / tokens
    values = _values_of_layer("compiled" if compiles(context) else "eager", llm.width, llm.ffn)
    # A layer that recomputes its activations keeps only its input.
    recomputed = min(context.model.llm_grad_checkpoint, llm.layers)
    numbers = (llm.layers - recomputed) * values + recomputed * llm.width
    total = at_once * (numbers + _values_of_adapters(context)) * 2 + labels * llm.vocabulary * LOGITS_BYTES
    if "vit" in context.trained_parts.names and context.with_vision:
        vit, kept_layers = context.vit, 1 if context.model.use_grad_checkpoint else context.vit["depth"]
        image_tokens = (context.model.image_size // vit["patch_size"]) ** 2 + 1
        values = _values_of_layer("eager", vit["embed_dim"], int(vit["embed_dim"] * vit["mlp_ratio"]))
        total += batch * image_tokens * kept_layers * values * 2
    return total


def _values_of_adapters(context: RunContext) -> int:
    """Numbers that adapters keep of a token for the backward pass: the layers' inputs, and A's outputs.

    Layers with the same input keep it once, unless each drops other numbers of it.
    """
    settings, kept = context.trained_parts.lora, {}
    for name, _, inputs in context.adapted_shapes:
        first = re.sub(r"\.(k_proj|v_proj)\.weight$", ".q_proj.weight", name.replace(".up_proj.", ".gate_proj."))
        kept[name if settings.dropout else first] = inputs
    return sum(kept.values()) + sum(settings.r for _ in context.adapted_shapes)


def _values_of_layer(kind: str, width: int, ffn_width: int) -> float:
    """Numbers that a layer keeps of a token for the backward pass. kind: a key of ACTIVATIONS."""
    widths, ffn_widths = ACTIVATIONS[kind]
    return widths * width + ffn_widths * ffn_width


def check_gpu_memory(context: RunContext) -> Iterator[Diagnostic]:
    """The longest batch fits on the GPU."""
    memory = estimate(context)
    if memory is None:
        yield ok("memory", "not estimated: the language model is not in a local folder")
        return
    parts = f"about {readable(memory.total)} (weights {readable(memory.weights)}"
    parts += f", training {readable(memory.training)}" if context.training else ""
    parts += f", {'activations' if context.training else 'a full context'} {readable(memory.activations)}"
    parts += f", CUDA graphs {readable(memory.graphs)}" if memory.graphs else ""
    parts += f", the rest {readable(WORKSPACE)})"
    if not context.on_gpu:
        available = available_memory()
        what = f"{parts}; {readable(available)} are free"
        yield verdict(memory.total > available, "host memory", what, "Use a smaller model, or a GPU.")
        return
    gpu = _joint(context.gpus) if context.model.llm_device_map else min(context.gpus, key=lambda gpu: gpu.total)
    needed, fix = memory.total + CONTEXT, advice(context, memory)
    what = f"{parts} and CUDA's own {readable(CONTEXT)}; {gpu.name} has {readable(gpu.total)}"
    if needed * (1 - TOLERANCE) > gpu.total:
        yield error("GPU memory", what, fix)
    elif needed * (1 + TOLERANCE) > gpu.total:
        yield warning("GPU memory", f"{what}: it will be tight", f"Try it with --probe. {fix}")
    elif needed > gpu.free:
        what += f", of which {readable(gpu.free)} are free"
        yield warning("GPU memory", what, "End the other programs on it, or choose another by CUDA_VISIBLE_DEVICES.")
    else:
        yield ok("GPU memory", what)


def _joint(gpus: list[Gpu]) -> Gpu:
    """The GPUs that the language model is spread over, as one."""
    total, free = sum(gpu.total for gpu in gpus), sum(gpu.free for gpu in gpus)
    return Gpu(f"all {len(gpus)} GPUs together", gpus[0].capability, total, free)


def advice(context: RunContext, memory: Memory) -> str:
    """The settings that would help, the best first."""
    smaller = {"16bit": "8bit", "8bit": "4bit", "8bit_weights": "4bit"}.get(context.load_in)
    in_fp8 = context.training and context.run.fp8  # needs a language model in 16 bit
    shrink = f"model.load_in={smaller}" if smaller and not in_fp8 else None
    otherwise = "Use a smaller language model or a GPU with more memory."
    if not context.training:
        return f"--options {shrink}" if shrink else otherwise
    half = max(context.run.batch_size_train // 2, 1)
    batch = f"run.batch_size_train={half} run.accum_grad_iters={2 * context.run.accum_grad_iters} (the same step)"
    recompute = f"model.llm_grad_checkpoint={context.llm.layers} (the same numbers, a third more time)"
    batch_helps = context.run.batch_size_train > 1 and half * longest_sequence(context) < _tokens_at_once(context)
    options = [
        recompute if context.model.llm_grad_checkpoint < context.llm.layers else None,
        batch if batch_helps else None,
        shrink,
    ]
    if memory.activations < memory.weights:
        options.reverse()
    possible = ", or ".join(option for option in options if option)
    return f"--options {possible}" if possible else otherwise


def check_host_memory(context: RunContext) -> Iterator[Diagnostic]:
    """Ranks and data workers fit into the memory of the host."""
    if not context.on_gpu:
        return
    workers = context.run.num_workers if context.training else 0
    needed = context.local_size * (HOST_BASE + workers * HOST_WORKER)
    available = available_memory()
    what = f"about {readable(needed)}; {readable(available)} are free"
    yield verdict(needed > available, "host memory", what, "Lower run.num_workers.", WARNING)
