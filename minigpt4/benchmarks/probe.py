"""Real steps with the longest batch: `doctor --probe`. Everything is loaded."""

import contextlib
import math
import tempfile
import time
from collections.abc import Iterable

import torch

from minigpt4.common.facts import IMAGE_SLOT
from minigpt4.common.registry import registry
from minigpt4.conversation.loading import load_chat, select_gpu
from minigpt4.doctor.check_memory import advice, estimate, longest_sequence
from minigpt4.doctor.diagnostic import Diagnostic, error, ok, warning
from minigpt4.doctor.machine import readable
from minigpt4.doctor.run_context import RunContext
from minigpt4.runners.prefetch import prefetch


def probe(context: RunContext) -> list[Diagnostic]:
    """Load the model, take three steps (or answer once, for a chat) and report the last one's time and memory."""
    if not context.is_ours:
        what = f"no step was taken: the longest batch of model.arch={context.model.get('arch')} is unknown"
        return [warning("probe", what)]
    try:
        return list(_train(context) if context.training else _chat(context))
    except torch.OutOfMemoryError as problem:
        what = f"out of memory with the longest batch: {str(problem).splitlines()[0]}"
        memory = estimate(context)
        return [error("probe", what, advice(context, memory) if memory else "Lower run.batch_size_train.")]
    except Exception as problem:  # whatever it is, it would have ended the run
        return [error("probe", f"{type(problem).__name__}: {problem}")]


def _train(context: RunContext) -> Iterable[Diagnostic]:
    cfg, run = context.cfg, context.run
    with tempfile.TemporaryDirectory() as folder:
        run.output_dir, run.resume_ckpt_path, run.num_workers = folder, None, 0
        run.valid_splits, run.test_splits = [], []
        task = registry.get_task_class(run.task).setup_task(cfg=cfg)
        model = task.build_model(cfg)
        samples = longest_batch(model, run.batch_size_train)
        datasets = {"probe": {split: [None] * run.batch_size_train for split in run.train_splits}}
        runner = registry.get_runner_class(run.runner)(cfg, task, model, datasets, "probe")
        runner.module.train()
        seconds = []
        # The first step compiles, the second captures CUDA graphs. The third replays them, so its time is reported.
        with contextlib.closing(prefetch([samples] * 3, runner.module, runner.device)) as batches:
            for batch in batches:
                start = time.perf_counter()
                loss = float(runner.train_step(batch, is_update=True))
                seconds.append(time.perf_counter() - start)
    if not math.isfinite(loss):
        yield error("probe", f"the loss is {loss}", "Check the weights; with fp16, try run.amp_dtype=bf16.")
        return
    tokens = longest_sequence(context)
    what = f"a step of {run.batch_size_train} × {tokens} tokens took {seconds[-1]:.2f} s, loss {loss:.2f}"
    yield from _measured(context, what, runner.device)


def longest_batch(model, batch_size: int) -> dict:
    """Random images (or features, for a model without vision) and texts that fill `max_txt_len` tokens."""
    texts = ["word " * model.max_txt_len] * batch_size
    if model.visual_encoder is None:
        queries, width = model.query_tokens.shape[1:]
        return {"image_features": torch.randn(batch_size, queries, width), "text_input": texts}
    size = model.visual_encoder.image_size
    return {"image": torch.randn(batch_size, 3, size, size), "text_input": texts}


def _chat(context: RunContext) -> Iterable[Diagnostic]:
    device = select_gpu(context.cfg, 0)
    chat = load_chat(context.cfg, device)
    model = chat.model
    size = model.visual_encoder.image_size
    start = time.perf_counter()
    prompt = (model.prompt_list or [IMAGE_SLOT])[0]
    image, options = torch.randn(1, 3, size, size, device=device), {"max_new_tokens": 32, "min_new_tokens": 32}
    model.generate(image, [prompt], decoding_loop=chat.decoding_loop, **options)
    yield from _measured(context, f"an answer of 32 tokens took {time.perf_counter() - start:.2f} s", device)


# Bytes by which the estimate may be wrong without a warning: small models are mostly overhead.
SMALL = 5e8


def _measured(context: RunContext, what: str, device: torch.device) -> Iterable[Diagnostic]:
    """What was measured, with the peak of a GPU's memory, and a warning if the estimate of it was far off."""
    if device.type != "cuda":
        yield ok("probe", what)
        return
    reserved, memory = torch.cuda.max_memory_reserved(), estimate(context)
    yield ok("probe", f"{what}, {readable(reserved)} of GPU memory reserved at most")
    if memory is None:
        return
    ratio = reserved / memory.total
    if not 0.8 < ratio < 1.25 and abs(reserved - memory.total) > SMALL:
        what = f"the estimate was {readable(memory.total)}, {ratio:.2f} times that was reserved"
        yield warning("probe", what, "Trust the probe; minigpt4/doctor/check_memory.py has the constants.")
