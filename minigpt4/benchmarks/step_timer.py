"""Times training steps and their parts, for `bench train`."""

import contextlib
import functools
import statistics
import time
from collections.abc import Iterator

from minigpt4.benchmarks.harness import clock, reset_peak_memory, time_in_turn, timed

# Steps that are timed part by part, after those that are timed as a whole.
PROFILED_STEPS = 5
# Side of the square matrices whose product measures the GPU's rate.
MATRIX_SIDE = 8192


class StepTimer:
    """Takes a runner's steps on `batches`, and records their seconds, losses and sizes."""

    ranks = 1  # whose tokens and images are counted

    def __init__(self, runner, batches: Iterator[dict]):
        self.runner, self.batches, self.device = runner, batches, runner.device
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.images: list[int] = []
        self.phases = {name: [] for name in ("data", "vision", "language", "backward", "optimizer")}
        self.memory: dict[str, int] = {}  # the peak of the GPU's, once it is known
        reset_peak_memory(self.device)

    def step(self) -> None:
        """One step as the runner takes it; its loss is read."""
        start = clock(self.device)
        samples = next(self.batches)
        self.phases["data"].append(time.perf_counter() - start)
        self.losses.append(float(self.runner.train_step(samples, is_update=True)))
        self.seconds.append(clock(self.device) - start)
        self.images.append(len(samples["image"]) if "image" in samples else 0)
        tokens = samples.get("tokens")
        self.tokens.append(int(tokens.num_tokens) if tokens is not None else 0)

    def profiled_step(self) -> None:
        """One more step, timed part by part: the host waits for the GPU before and after each part.

        A plug-in's model may have no step object; its vision side is then counted as language.
        """
        samples, step = next(self.batches), getattr(self.runner.module, "step", None)
        with (
            timed(self.runner.task, "train_step", self.device) as forward,
            timed(self.runner.optimizer, "step", self.device) as optimizer,
            timed(step, "vision", self.device) if step else contextlib.nullcontext([]) as vision,
        ):
            start = clock(self.device)
            self.runner.train_step(samples, is_update=True)
            whole = clock(self.device) - start
        self.phases["vision"].append(sum(vision))
        self.phases["language"].append(sum(forward) - sum(vision))
        self.phases["backward"].append(whole - sum(forward) - sum(optimizer))
        self.phases["optimizer"].append(sum(optimizer))

    def summary(self, warmup: int) -> dict:
        """The results of the steps after the first `warmup`: median, least and most seconds, rates, parts, memory."""
        seconds, tokens = self.seconds[warmup:], statistics.mean(self.tokens[warmup:])
        images = statistics.mean(self.images[warmup:])
        median = statistics.median(seconds)
        phases = self.phases | {"data": self.phases["data"][warmup:]}
        summary = {
            "dtype": str(self.runner.dtype).removeprefix("torch."),
            "median_s": round(median, 4),
            "min_s": round(min(seconds), 4),
            "max_s": round(max(seconds), 4),
            "loss": round(statistics.mean(self.losses[warmup:]), 5),
            "images_per_s": round(images / median, 1),
            "tokens_per_s": round(tokens / median),
            **{f"{name}_s": round(statistics.median(values), 4) for name, values in phases.items()},
            "first_step_s": round(self.seconds[0], 1),
            **self.memory,
        }
        work = useful_operations(self.runner.module, tokens, images)
        if self.device.type == "cuda" and work:
            rate = matrix_rate(self.device)
            summary["matrix_TFLOP_per_s"] = round(rate / 1e12)
            summary["share_of_matrix_rate"] = round(work / median / (rate * self.ranks), 3)
        return summary


def useful_operations(model, tokens: float, images: float) -> float:
    """Floating-point operations that every way of computing a step needs; 0 for a model that is no MiniGPT4.

    A token takes four for each weight of the language model's layers (forward, and the gradient of the input). An image
    token takes two for each weight of the frozen encoder.
    """
    from minigpt4.models import MiniGPT4
    from minigpt4.models.loading import parameter_count

    if not isinstance(model, MiniGPT4):
        return 0
    language = sum(map(parameter_count, model.llama_model.get_decoder().layers.parameters()))
    if model.visual_encoder is None:
        return 4 * language * tokens
    encoder = sum(map(parameter_count, model.visual_encoder.parameters()))
    return 4 * language * tokens + 2 * encoder * model.visual_encoder.pos_embed.shape[1] * images


@functools.cache
def matrix_rate(device) -> float:
    """Operations a second of a bfloat16 product of two square matrices on the GPU, the median of ten."""
    import torch

    a, b = (torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = time_in_turn({"product": lambda: a @ b}, rounds=10, warmup=3, read=lambda: clock(device))["product"]
    return 2 * MATRIX_SIDE**3 / statistics.median(seconds)
