"""How much memory and time a run takes, from shapes alone.

The model of a GPU's memory, in bytes:

    weights      2 for each frozen parameter (16 bit), 1 or 0.5625 for those of the language model that 8 or 4 bit
                 shrink, 4 for what trains, and for all on a CPU
    training     12 more for each trained parameter, which is float32: gradient and AdamW's two averages
    activations  what the backward pass needs of the language model: for each token and layer a multiple of its width
                 and of its feed-forward width, in 16 bit; for each labelled token a multiple of the vocabulary. Of a
                 packed batch, of as many tokens as its largest piece may have (`fast/packing/batch.py`)
    the rest     a fixed sum for what lies between, another for the memory that CUDA graphs keep apart, and CUDA's own
                 context

`ACTIVATIONS` holds the multiples, `GRAPHS` that other sum. They come from three runs of `bench train` on an H100
(S1/16, S1/64 and S2/12: Llama-7B with random weights, bfloat16, torch 2.11). None of them is in the table of
docs/performance.md, which has other states of the code. Peaks in MiB:

    eager        fitted to 19,168, 30,631 and 26,380 (`max_mem_MB`): padded batches, before layers were compiled
    compiled     fitted to 17,872, 26,056 and 23,109: the first layers that were
    graphs       later runs of `rehearse` (7b, S1/16 and S2/12), with CUDA graphs and in pieces: 17,786 and 18,959, for
                 which 19,321 and 20,475 were reserved (`gpu_GB`, `reserved_GB`); `GRAPHS` is about the difference

The estimate is within 1 % of the first two. It is 1 % above what the third reserved at S1/16, and more at S2/12: there
it reckons with a piece of 1,536 rows, where that run's had 1,024. Measure again and change the constants here when the
way a step is computed changes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from minigpt4.common.facts import tokens_per_micro_batch
from minigpt4.doctor.case import RunContext
from minigpt4.doctor.findings import Diagnostic, error, ok, warning
from minigpt4.doctor.machine import MIB, Gpu, available_memory, readable
from minigpt4.doctor.sizes import qformer_parameters, vit_parameters
from minigpt4.doctor.texts import IMAGE_SLOT, load_tokenizer
from minigpt4.runners.schedule import TrainingSchedule


@dataclass(frozen=True)
class Activations:
    """16-bit numbers that are kept for the backward pass, for each token and layer."""

    widths: float
    """times the width of the model"""
    ffn_widths: float
    """times the width of its feed-forward layer"""


ACTIVATIONS = {
    "eager": Activations(8.2, 3),
    "compiled": Activations(6.1, 2),
}
LOGITS_BYTES = 10
"""For each labelled token and entry of the vocabulary: logits in 16 bit and float32, and their gradient."""
BYTES_PER_PARAMETER = {"16bit": 2.0, "8bit": 1.0, "8bit_weights": 1.0, "4bit": 0.5 + 4 / 64}
TRAINING_BYTES = 12
WORKSPACE = 200 * MIB
CONTEXT = 700 * MIB
GRAPHS = 1600 * MIB
# What one rank takes of the host: libraries and CUDA, and each data worker with its share of shuffled samples.
HOST_BASE, HOST_WORKER = 4.5e9, 0.9e9
# An estimate is good to about so much.
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


def parts(case: RunContext) -> dict[str, int]:
    """Parameters of the vision side, as far as it is loaded."""
    if not case.with_vision:
        return {"vit": 0, "qformer": 0}
    vit, image_dim = case.vit or {}, (case.vit or {}).get("embed_dim", 0)
    return {
        "vit": vit_parameters(image_size=case.model.image_size, **vit) + 2 * image_dim if vit else 0,
        "qformer": qformer_parameters(image_dim=image_dim, **case.qformer)
        + case.model.num_query_token * case.qformer["hidden_size"],
    }


def trainable_parameters(case: RunContext) -> int:
    """As many as a checkpoint holds. 0 where the language model is not known."""
    if not case.is_ours or not case.llm or not case.llm.width:
        return 0
    sizes = parts(case)
    projection = (case.qformer["hidden_size"] + 1) * case.llm.width
    unfrozen = (not case.model.freeze_vit) * sizes["vit"] + (not case.model.freeze_qformer) * sizes["qformer"]
    return projection + unfrozen


def longest_sequence(case: RunContext) -> int:
    """Tokens of the longest sample: <s>, prompt, image, text."""
    prompt = 0
    path = case.model.prompt_path
    if path and case.llm_folder:
        try:
            tokenizer = load_tokenizer(case.llm_folder)
            with open(path, encoding="utf-8") as file:
                lines = [line.strip() for line in file if IMAGE_SLOT in line]
            wrapped = [case.model.prompt_template.replace("{}", line).replace(IMAGE_SLOT, "") for line in lines]
            prompt = max((len(tokenizer.encode(text)) for text in wrapped), default=0) if tokenizer else 30
        except Exception:  # the checks of texts and paths say what is wrong with them
            prompt = 30
    return 1 + prompt + case.model.num_query_token + case.model.max_txt_len


def estimate(case: RunContext) -> Memory | None:
    """Memory of the device with the longest batch; None where the language model's sizes are not known."""
    llm = case.llm
    if not llm or not llm.tensors or not llm.width or not llm.layers:
        return None
    shrinking, kept = llm.parameters()
    sizes, trained = parts(case), trainable_parameters(case)
    full = not case.on_gpu or not case.run.amp
    weights = (
        (shrinking + kept) * (4 if case.load_in == "16bit" else 2)
        if full
        else shrinking * BYTES_PER_PARAMETER[case.load_in] + kept * 2
    )
    vit_bytes = 4 if full or case.model.vit_precision == "fp32" or not case.model.freeze_vit else 2
    qformer_bytes = 4 if full or not case.model.freeze_qformer else 2
    weights += (
        sizes["vit"] * vit_bytes + sizes["qformer"] * qformer_bytes + (case.qformer["hidden_size"] + 1) * llm.width * 4
    )
    if not case.training:
        tokens = 2000  # a chat's context at most
        return Memory(weights, 0, tokens * llm.layers * llm.kv_width * 2 * (4 if full else 2))
    # Of the language model, whose padded batches are not recorded. A small model's are small.
    recorded = compiles(case) and case.run.packed
    graphs = min(GRAPHS, weights) if recorded else 0
    return Memory(weights, trained * TRAINING_BYTES, _activations(case) * (2 if full else 1), graphs)


def compiles(case: RunContext) -> bool:
    return case.run.compile and case.on_gpu and case.run.amp


def _tokens_at_once(case: RunContext) -> float:
    """Tokens whose activations are kept at a time: of the largest piece of a batch, or of all of it."""
    tokens = longest_sequence(case)
    all_of_them = case.run.batch_size_train * tokens
    in_pieces = case.on_gpu and case.run.amp and case.run.packed and case.run.amp_dtype != "fp16"
    if not in_pieces:
        return all_of_them
    return min(all_of_them, max(tokens_per_micro_batch(case.run.fp8, min(gpu.total for gpu in case.gpus)), tokens))


def _activations(case: RunContext) -> float:
    llm, batch = case.llm, case.run.batch_size_train
    tokens = longest_sequence(case)
    at_once = _tokens_at_once(case)
    labels = case.model.max_txt_len * at_once / tokens
    kind = ACTIVATIONS["compiled" if compiles(case) else "eager"]
    values = kind.widths * llm.width + kind.ffn_widths * llm.ffn
    # a layer that recomputes keeps its input alone
    recomputed = min(case.model.llm_grad_checkpoint, llm.layers)
    numbers = (llm.layers - recomputed) * values + recomputed * llm.width
    total = at_once * numbers * 2 + labels * (llm.vocabulary or 0) * LOGITS_BYTES
    if not case.model.freeze_vit and case.vit and case.with_vision:
        vit, kept_layers = case.vit, 1 if case.model.use_grad_checkpoint else case.vit["depth"]
        image_tokens = (case.model.image_size // vit["patch_size"]) ** 2 + 1
        eager = ACTIVATIONS["eager"]
        width = eager.widths * vit["embed_dim"] + eager.ffn_widths * int(vit["embed_dim"] * vit["mlp_ratio"])
        total += batch * image_tokens * kept_layers * width * 2
    return total


def check_gpu_memory(case: RunContext) -> Iterator[Diagnostic]:
    """The longest batch fits on the GPU."""
    memory = estimate(case)
    if memory is None:
        if case.is_ours:
            what = "cannot be estimated: the language model's files cannot be looked into"
            yield ok("memory", what)
        return
    told = f"about {readable(memory.total)} (weights {readable(memory.weights)}"
    told += f", training {readable(memory.training)}" if case.training else ""
    told += f", {'activations' if case.training else 'a full context'} {readable(memory.activations)}"
    told += f", CUDA graphs {readable(memory.graphs)}" if memory.graphs else ""
    told += f", the rest {readable(WORKSPACE)})"
    if not case.on_gpu:
        yield from _on_the_host(memory, told)
        return
    gpu = _joint(case.gpus) if case.model.llm_device_map else min(case.gpus, key=lambda gpu: gpu.total)
    needed, fix = memory.total + CONTEXT, advice(case, memory)
    what = f"{told} and CUDA's own {readable(CONTEXT)}; {gpu.name} has {readable(gpu.total)}"
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
    """Several GPUs over which the language model is spread."""
    total, free = sum(gpu.total for gpu in gpus), sum(gpu.free for gpu in gpus)
    return Gpu(f"all {len(gpus)} GPUs together", gpus[0].capability, total, free)


def advice(case: RunContext, memory: Memory) -> str:
    """The setting that would help most, first."""
    smaller = {"16bit": "8bit", "8bit": "4bit", "8bit_weights": "4bit"}.get(case.load_in)
    in_fp8 = case.training and case.run.fp8  # which needs a language model in 16 bit
    shrink = f"model.load_in={smaller}" if smaller and not in_fp8 else None
    otherwise = "Use a smaller language model or a GPU with more memory."
    if not case.training:
        return f"--options {shrink}" if shrink else otherwise
    half = max(case.run.batch_size_train // 2, 1)
    batch = f"run.batch_size_train={half} run.accum_grad_iters={2 * case.run.accum_grad_iters} (the same step)"
    recompute = f"model.llm_grad_checkpoint={case.llm.layers} (the same numbers, a third more time)"
    options = [
        recompute if case.model.llm_grad_checkpoint < case.llm.layers else None,
        batch if case.run.batch_size_train > 1 and half * longest_sequence(case) < _tokens_at_once(case) else None,
        shrink,
    ]
    if memory.activations < memory.weights:
        options.reverse()
    possible = ", or ".join(option for option in options if option)
    return f"--options {possible}" if possible else otherwise


def _on_the_host(memory: Memory, told: str) -> Iterator[Diagnostic]:
    available = available_memory()
    if available is None:
        yield ok("host memory", told)
    elif memory.total > available:
        yield error("host memory", f"{told}; {readable(available)} are free", "Use a smaller model, or a GPU.")
    else:
        yield ok("host memory", f"{told}; {readable(available)} are free")


def check_host_memory(case: RunContext) -> Iterator[Diagnostic]:
    """Ranks and data workers fit into the host's memory."""
    available = available_memory()
    if not case.on_gpu or available is None:
        return
    workers = case.run.num_workers if case.training else 0
    needed = case.local_size * (HOST_BASE + workers * HOST_WORKER)
    what = f"about {readable(needed)}; {readable(available)} are free"
    if needed > available:
        yield warning("host memory", what, "Lower run.num_workers.")
    else:
        yield ok("host memory", what)


def check_length(case: RunContext) -> Iterator[Diagnostic]:
    """How long the run is, in steps, samples and time."""
    run = case.run
    if not case.training:
        return
    if run.iters_per_epoch is None:
        return
    length = TrainingSchedule(
        run.batch_size_train, case.world_size, run.iters_per_epoch, run.max_epoch, run.accum_grad_iters, case.on_gpu
    )
    duration = f"; {length.duration(case.step_time)} at {case.step_time} s a step" if case.step_time else ""
    yield ok("length", f"{length}{duration}")
    if run.warmup_steps > run.iters_per_epoch and run.max_epoch > 1:
        what = (
            f"{run.warmup_steps} is longer than an epoch, {run.iters_per_epoch}: the next one begins to warm up again"
        )
        yield warning("run.warmup_steps", what, f"--options run.warmup_steps={run.iters_per_epoch}")
