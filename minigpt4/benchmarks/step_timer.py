"""Times training steps, and the parts of a step: what `bench train` reports."""

import contextlib
import functools
import statistics
import time
from collections.abc import Iterator

# Steps that are taken apart, after the timed ones.
APART = 5
# Side of the square matrices whose product is the card's measured rate.
MATRIX = 8192


class StepTimer:
    """Takes steps and keeps their seconds, and where these went."""

    ranks = 1  # that tokens and images are of

    def __init__(self, runner, batches: Iterator[dict]):
        self.runner, self.batches = runner, batches
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.images: list[int] = []
        self.phases = {name: [] for name in ("data", "vision", "language", "backward", "optimizer")}
        self.memory: dict[str, int] = {}
        self._wait()
        if self._on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()

    @property
    def _on_gpu(self) -> bool:
        return self.runner.device.type == "cuda"

    def _wait(self) -> float:
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def step(self) -> None:
        """One step as the runner takes it, its loss read."""
        start = self._wait()
        samples = next(self.batches)
        arrived = time.perf_counter()
        self.losses.append(float(self.runner.train_step(samples, is_update=True)))
        self.seconds.append(self._wait() - start)
        self.phases["data"].append(arrived - start)
        self.images.append(len(samples["image"]) if "image" in samples else 0)
        tokens = samples.get("tokens")
        self.tokens.append(int(tokens.num_tokens) if tokens is not None else 0)

    def profiled_step(self) -> None:
        """One more step, with a wait for the GPU around each part of it."""
        runner, spent = self.runner, dict.fromkeys(("vision", "forward", "optimizer"), 0.0)
        samples = next(self.batches)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._clocked(runner.module, "query_outputs", spent, "vision"))
            stack.enter_context(self._clocked(runner.task, "train_step", spent, "forward"))
            stack.enter_context(self._clocked(runner, "optimizer_step", spent, "optimizer"))
            start = self._wait()
            runner.train_step(samples, is_update=True)
            whole = self._wait() - start
        self.phases["vision"].append(spent["vision"])
        self.phases["language"].append(spent["forward"] - spent["vision"])
        self.phases["backward"].append(whole - spent["forward"] - spent["optimizer"])
        self.phases["optimizer"].append(spent["optimizer"])

    @contextlib.contextmanager
    def _clocked(self, owner, method: str, spent: dict[str, float], part: str) -> Iterator[None]:
        """While it is entered, seconds in `owner.method`, if there is one, are added to spent[part]."""
        own, function = vars(owner).get(method), getattr(owner, method, None)

        def clocked(*args, **kwargs):
            start = self._wait()
            result = function(*args, **kwargs)
            spent[part] += self._wait() - start
            return result

        if function is not None:
            setattr(owner, method, clocked)
        yield
        if function is not None:
            delattr(owner, method) if own is None else setattr(owner, method, own)

    def note_memory(self) -> None:
        """The peak of the GPU's memory up to here."""
        if self._on_gpu:
            import torch

            self.memory["max_mem_MB"] = torch.cuda.max_memory_allocated() // 2**20
            self.memory["reserved_MB"] = torch.cuda.max_memory_reserved() // 2**20

    def row(self, warmup: int) -> dict:
        """Median, least and most seconds of the steps after the warm-up, rates, parts, the peak of the GPU's memory."""
        seconds, tokens = self.seconds[warmup:], statistics.mean(self.tokens[warmup:])
        images = statistics.mean(self.images[warmup:])
        median = statistics.median(seconds)
        self.phases["data"] = self.phases["data"][warmup:]
        row = {
            "dtype": str(self.runner.dtype).removeprefix("torch."),
            "median_s": round(median, 4),
            "min_s": round(min(seconds), 4),
            "max_s": round(max(seconds), 4),
            "loss": round(statistics.mean(self.losses[warmup:]), 5),
            "images_per_s": round(images / median, 1),
            "tokens_per_s": round(tokens / median),
            **{f"{name}_s": round(statistics.median(values), 4) for name, values in self.phases.items()},
            "first_step_s": round(self.seconds[0], 1),
            **self.memory,
        }
        work = useful_operations(self.runner.module, tokens, images)
        if self._on_gpu and work:
            rate = matrix_rate()
            row["matrix_TFLOP_per_s"] = round(rate / 1e12)
            row["share_of_matrix_rate"] = round(work / median / (rate * self.ranks), 3)
        return row


def useful_operations(model, tokens: float, images: float) -> float:
    """Floating-point operations of a step that no way of computing it can do without; 0 for a model of another kind.

    Four a token for each weight in the language model's layers (forward, and the gradient of the input), two an image
    token for each weight of a frozen encoder.
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
def matrix_rate() -> float:
    """Operations a second of a bfloat16 product of two square matrices on the GPU, the median of ten."""
    import torch

    a, b = (torch.randn(MATRIX, MATRIX, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(13):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return 2 * MATRIX**3 / statistics.median(seconds[3:])
