"""python -m minigpt4 bench train: time training steps.

    python -m minigpt4 bench train                             # full size, random weights: S1/16, S1/64, S2/12 on a GPU
    python -m minigpt4 bench train --baseline FILE             # beside another script's `Baseline` and `measure`
    python -m minigpt4 bench train --compare run.compile=false # two settings in one process, step by step in turn
    python -m minigpt4 bench train --cfg-path train_configs/minigpt4_tiny_stage1_pretrain.yaml   # a config, its data

A step is: images on the host, forward, backward, optimiser step, loss read. Captions have 8 to 24 tokens in stage 1
and 80 to 160 in stage 2, drawn with seed 1; stage 2 has a prompt of 22 tokens around the image. Where the time goes is
seen in more steps after the timed ones, each part of which is waited for: their sum is more than a step's time.
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
import itertools
import json
import random
import statistics
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

WORK = {"S1/16": (1, 16), "S1/64": (1, 64), "S2/12": (2, 12)}
VOCABULARY = 32000
# Steps that are taken apart, after the timed ones.
APART = 5
# Side of the square matrices whose product is the card's measured rate.
MATRIX = 8192
TRAIN_CONFIGS = Path(__file__).resolve().parents[2] / "train_configs"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="minigpt4 bench train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=list(WORK), help="workloads (full size)")
    parser.add_argument("--cfg-path", metavar="FILE", help="time this training config on its own data instead")
    parser.add_argument("--options", nargs="+", metavar="KEY=VALUE", help="settings, as for train.py")
    parser.add_argument("--compare", nargs="+", metavar="KEY=VALUE", help="time these settings too, in turn")
    parser.add_argument(
        "--load-in", default="16bit", choices=("16bit", "8bit", "4bit"), help="language model's weights"
    )
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: 20)")
    parser.add_argument("--warmup", type=int, default=20, help="steps before them (default: 20)")
    parser.add_argument("--small", action="store_true", help="small random model, to try the script on a CPU")
    parser.add_argument("--baseline", metavar="FILE", help="script with `Baseline` and `measure(model, work)`")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.warmup < 0:
        parser.error(f"--steps {args.steps} must be at least 1, --warmup {args.warmup} at least 0.")
    return args


def main(argv: list[str] | None = None) -> int:
    """Time what the arguments name, and print a line for each workload."""
    args = parse_args(argv)
    if args.cfg_path:
        rows = time_config(args)
    else:
        rows = itertools.chain(time_baseline(args.baseline, args.work) if args.baseline else [], time_full_size(args))
    for row in rows:
        report(row, args.json)
    return 0


def report(row: dict, as_json: bool) -> None:
    print(json.dumps(row) if as_json else "  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)


def time_config(args: argparse.Namespace) -> Iterator[dict]:
    """Steps of a training config, with its own model and data, through its own runner."""
    from minigpt4.common.config import Config
    from minigpt4.common.registry import registry

    with contextlib.ExitStack() as stack:
        runners = []
        for options in settings(args):
            cfg = Config(SimpleNamespace(cfg_path=args.cfg_path, options=options))
            cfg.check_paths(datasets=True)
            cfg.run_cfg.output_dir = stack.enter_context(tempfile.TemporaryDirectory())
            task = registry.get_task_class(cfg.run_cfg.task).setup_task(cfg=cfg)
            runner_class = registry.get_runner_class(cfg.run_cfg.runner)
            runner = runner_class(cfg, task, task.build_model(cfg), task.build_datasets(cfg), "bench")
            runners.append((runner, runner.loader.epoch(0, args.warmup + args.steps + APART)))
        yield from time_in_turn(args, args.cfg_path, runners)


def time_full_size(args: argparse.Namespace) -> Iterator[dict]:
    """The fixed workloads with random weights at full size (or small), through the runner."""
    from minigpt4.common import dist_utils
    from minigpt4.common.config import Config
    from minigpt4.runners import RunnerBase
    from minigpt4.tasks import ImageTextPretrainTask

    device = dist_utils.select_device("cuda")
    for work in args.work:
        stage, batch_size = WORK[work]
        name = {1: "stage1_pretrain", 2: "stage2_finetune"}[stage]
        with contextlib.ExitStack() as stack:
            free_memory()
            runners = []
            for options in settings(args):
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                options = [*options, f"run.output_dir={folder}", "run.num_workers=0"]
                cfg = Config(SimpleNamespace(cfg_path=TRAIN_CONFIGS / f"minigpt4_{name}.yaml", options=options))
                dtype = dist_utils.select_dtype(device, cfg.run_cfg.amp, cfg.run_cfg.amp_dtype)
                model = random_model(device, dtype, args.small, args.load_in, cfg.model_cfg.llm_grad_checkpoint)
                model.max_txt_len, model.end_sym = cfg.model_cfg.max_txt_len, " ."
                model.prompt_list = [" w" * 11 + "<ImageHere>" + " w" * 11] if stage == 2 else []
                datasets = {"random": {"train": RandomPairs(256)}}
                runner = RunnerBase(cfg, ImageTextPretrainTask(), model.train(), datasets, "bench")
                runners.append((runner, random_batches(stage, batch_size, args.warmup + args.steps + APART)))
            del runner, model
            yield from time_in_turn(args, work, runners)
            runners.clear()


def settings(args: argparse.Namespace) -> list[list[str]]:
    """The options of each setting that is timed: one, or with --compare two."""
    first = args.options or []
    if not args.compare:
        return [first]
    changed = {option.split("=")[0] for option in args.compare}
    return [first, [*(option for option in first if option.split("=")[0] not in changed), *args.compare]]


def time_in_turn(args: argparse.Namespace, work: str, runners: list) -> Iterator[dict]:
    """Rows for the runners' steps on their batches, one step of each in turn."""
    from minigpt4.runners.prefetch import prefetch

    with contextlib.ExitStack() as stack:
        timers = []
        for runner, batches in runners:
            runner.module.train()
            ready = stack.enter_context(contextlib.closing(prefetch(batches, runner.module, runner.device)))
            timers.append(StepTimer(runner, ready))
        for _ in range(args.warmup + args.steps):
            for timer in timers:
                timer.step()
        for timer in timers:
            timer.note_memory()
            for _ in range(APART):
                timer.step_apart()
    for timer, options in zip(timers, settings(args), strict=True):
        yield {"work": work, "options": " ".join(options), **timer.row(args.warmup)}
    if len(timers) == 2:
        first, second = (timer.seconds[args.warmup :] for timer in timers)
        ratios = [b / a for a, b in zip(first, second, strict=True)]
        yield {"work": work, "second / first, median of pairs": round(statistics.median(ratios), 3)}


class StepTimer:
    """Takes steps and keeps their seconds, and where these went."""

    def __init__(self, runner, batches: Iterator[dict]):
        self.runner, self.batches = runner, batches
        self.seconds: list[float] = []
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
        float(self.runner.train_step(samples, is_update=True))
        self.seconds.append(self._wait() - start)
        self.phases["data"].append(arrived - start)
        self.images.append(len(samples["image"]) if "image" in samples else 0)
        tokens = samples.get("tokens")
        self.tokens.append(int(tokens.num_tokens) if tokens is not None else 0)

    def step_apart(self) -> None:
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
            row["share_of_matrix_rate"] = round(work / median / rate, 3)
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


def time_baseline(path: str, work: list[str]) -> Iterator[dict]:
    """The workloads in the way of another script, whose memory is free again afterwards."""
    spec = importlib.util.spec_from_file_location("baseline", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model = script.Baseline()
    for name in work:
        yield {"baseline": True, **script.measure(model, name)}


def free_memory() -> None:
    """Give back what earlier models held, compiled code included."""
    import torch

    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def random_model(device, dtype, small: bool, load_in: str = "16bit", llm_grad_checkpoint: int = 0):
    """MiniGPT-4 with a Llama-7B (or small parts), random weights, straight on the device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from minigpt4.models import MiniGPT4
    from minigpt4.models.eva_vit import create_vit
    from minigpt4.models.precision import cast_matrices
    from minigpt4.models.qformer import QFormer

    vit_model, qformer, llama = "eva_clip_g", {}, {}
    if small:
        vit_model = {"patch_size": 56, "embed_dim": 64, "depth": 2, "num_heads": 2, "mlp_ratio": 4}
        qformer = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        llama = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        llm = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **llama)).requires_grad_(False)
        torch.set_default_dtype(torch.float32)
        vit = create_vit(vit_model, 224)
        if load_in != "16bit":
            quantize(llm.model, load_in, dtype)
        model = MiniGPT4(
            vit,
            QFormer(vit.embed_dim, **qformer),
            llm,
            WordTokenizer(),
            dtype=dtype,
            llm_grad_checkpoint=llm_grad_checkpoint,
        )
    cast_matrices(vit, dtype)
    return model


def quantize(module, load_in: str, dtype) -> None:
    """Quantise the linear layers in place, as bitsandbytes does on loading."""
    import bitsandbytes as bnb
    from torch import nn

    for name, layer in module.named_children():
        if not isinstance(layer, nn.Linear):
            quantize(layer, load_in, dtype)
            continue
        shape, weight = (layer.in_features, layer.out_features), layer.weight.data
        if load_in == "8bit":
            quantized = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, device="meta")
            quantized.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        else:
            quantized = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
            quantized.weight = bnb.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
        setattr(module, name, quantized.to(weight.device))


class WordTokenizer:
    """One token a word, so that lengths are as wanted."""

    bos_token_id, eos_token_id = 1, 2

    def encode(self, text: str) -> list[int]:
        return [3 + zlib.crc32(word.encode()) % (VOCABULARY - 3) for word in text.split()]


class RandomPairs:
    """A length is all that the runner's set-up asks of it: the batches are made beforehand."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length


def random_batches(stage: int, batch_size: int, count: int) -> Iterator[dict]:
    """Batches on the host: random images (three sets in turn) and captions of the workload's lengths."""
    import torch

    low, high = (80, 160) if stage == 2 else (8, 24)
    rng = random.Random(1)
    images = [torch.randn(batch_size, 3, 224, 224) for _ in range(3)]
    for i in range(count):
        texts = [" ".join(["w"] * (rng.randint(low, high) - 1)) for _ in range(batch_size)]
        yield {"image": images[i % 3], "text_input": texts}
