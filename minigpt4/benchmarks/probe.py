"""Real steps with the longest batch: `doctor --probe`. Everything is loaded."""

import contextlib
import tempfile
import time
from collections.abc import Iterable

from minigpt4.doctor.case import RunContext
from minigpt4.doctor.estimate import estimate, longest_sequence
from minigpt4.doctor.findings import Diagnostic, error, ok, warning
from minigpt4.doctor.machine import readable


def probe(case: RunContext) -> list[Diagnostic]:
    """Load the model, take three steps (or answer once, for a chat) and say what the last took."""
    import torch

    if not case.is_ours:
        return [warning("probe", f"knows no longest batch of model.arch={case.model.get('arch')}: no step was taken")]
    try:
        return list(_train(case) if case.training else _chat(case))
    except torch.OutOfMemoryError as problem:
        what = f"out of memory with the longest batch: {str(problem).splitlines()[0]}"
        return [error("probe", what, _advice(case))]
    except Exception as problem:  # whatever it is, it is what the run would have died of
        return [error("probe", f"{type(problem).__name__}: {problem}")]


def _train(case: RunContext) -> Iterable[Diagnostic]:
    import torch

    from minigpt4.common.registry import registry
    from minigpt4.runners.prefetch import prefetch

    cfg, run = case.cfg, case.run
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
        # The first step compiles, the second records CUDA graphs; the third, which replays them, shows the time.
        with contextlib.closing(prefetch([samples] * 3, runner.module, runner.device)) as batches:
            for batch in batches:
                start = time.perf_counter()
                loss = float(runner.train_step(batch, is_update=True))
                seconds.append(time.perf_counter() - start)
    if loss != loss or abs(loss) == float("inf"):
        yield error("probe", f"the loss is {loss}", "Check the weights; with fp16, try run.amp_dtype=bf16.")
        return
    tokens = longest_sequence(case)
    what = f"a step of {run.batch_size_train} × {tokens} tokens took {seconds[-1]:.2f} s, loss {loss:.2f}"
    yield ok("probe", what + (f", {_peak(torch)}" if runner.device.type == "cuda" else ""))
    yield from _compare(case, runner.device.type == "cuda", torch)


def longest_batch(model, batch_size: int) -> dict:
    """Random images (or features, for a model without vision) and texts that fill `max_txt_len` tokens."""
    import torch

    texts = ["word " * model.max_txt_len] * batch_size
    if model.visual_encoder is None:
        queries, width = model.query_tokens.shape[1], model.llama_proj.in_features
        return {"image_features": torch.randn(batch_size, queries, width), "text_input": texts}
    size = model.visual_encoder.image_size
    return {"image": torch.randn(batch_size, 3, size, size), "text_input": texts}


def _chat(case: RunContext) -> Iterable[Diagnostic]:
    import torch

    from minigpt4.conversation.loading import load_chat, select_gpu

    device = select_gpu(case.cfg, 0)
    chat = load_chat(case.cfg, device)
    model = chat.model
    size = model.visual_encoder.image_size
    start = time.perf_counter()
    prompt = (model.prompt_list or ["<ImageHere>"])[0]
    image, options = torch.randn(1, 3, size, size, device=device), {"max_new_tokens": 32, "min_new_tokens": 32}
    model.generate(image, [prompt], decoding_loop=chat.decoding_loop, **options)
    what = f"an answer of 32 tokens took {time.perf_counter() - start:.2f} s"
    yield ok("probe", what + (f", {_peak(torch)}" if device.type == "cuda" else ""))
    yield from _compare(case, device.type == "cuda", torch)


def _peak(torch) -> str:
    return f"{readable(torch.cuda.max_memory_reserved())} of GPU memory reserved at most"


# Bytes by which estimate and probe may differ without a word: small models are all overhead.
SMALL = 5e8


def _compare(case: RunContext, on_gpu: bool, torch) -> Iterable[Diagnostic]:
    """An estimate that was far off is said to have been."""
    reckoned = estimate(case)
    if not on_gpu or reckoned is None:
        return
    reserved = torch.cuda.max_memory_reserved()
    share = reserved / reckoned.total
    if not 0.8 < share < 1.25 and abs(reserved - reckoned.total) > SMALL:
        what = f"the estimate was {readable(reckoned.total)}, {share:.2f} times that was reserved"
        yield warning("probe", what, "Trust the probe; minigpt4/doctor/estimate.py has the constants.")


def _advice(case: RunContext) -> str:
    from minigpt4.doctor.estimate import advice

    reckoned = estimate(case)
    return advice(case, reckoned) if reckoned else "Lower run.batch_size_train."
