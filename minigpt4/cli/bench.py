"""python -m minigpt4 bench: time training steps.

    python -m minigpt4 bench                             # full size, random weights: S1/16, S1/64, S2/12 on a GPU
    python -m minigpt4 bench --baseline FILE             # beside another script's `Baseline` and `measure`, in turn
    python -m minigpt4 bench --cfg-path train_configs/minigpt4_tiny_stage1_pretrain.yaml     # a config, its real data

A step is: images on the host, forward, backward, optimiser step, loss read. Captions have 8 to 24 tokens in stage 1
and 80 to 160 in stage 2, drawn with seed 1; stage 2 has a prompt of 22 tokens around the image.
"""

import argparse
import gc
import importlib.util
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

WORK = {"S1/16": (1, 16), "S1/64": (1, 64), "S2/12": (2, 12)}
VOCABULARY = 32000
TRAIN_CONFIGS = Path(__file__).resolve().parents[2] / "train_configs"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="minigpt4 bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", nargs="+", default=list(WORK), choices=list(WORK), help="workloads (full size)")
    parser.add_argument("--cfg-path", metavar="FILE", help="time this training config on its own data instead")
    parser.add_argument("--options", nargs="+", metavar="KEY=VALUE", help="settings, as for train.py")
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: 20)")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them (default: 5)")
    parser.add_argument("--small", action="store_true", help="small random model, to try the script on a CPU")
    parser.add_argument("--baseline", metavar="FILE", help="script with `Baseline` and `measure(model, work)`")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Time what the arguments name, and print a line for each workload."""
    args = parse_args(argv)
    if args.cfg_path:
        report(time_config(args), args.json)
        return 0
    rows = []
    if args.baseline:
        rows += time_baseline(args.baseline, args.work)
    rows += time_full_size(args)
    for row in rows:
        report(row, args.json)
    return 0


def report(row: dict, as_json: bool) -> None:
    print(json.dumps(row) if as_json else "  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)


def time_config(args: argparse.Namespace) -> dict:
    """Steps of a training config, with its own model and data, through its own runner."""
    from minigpt4.common.config import Config
    from minigpt4.common.registry import registry

    cfg = Config(args)
    cfg.check_paths(datasets=True)
    task = registry.get_task_class(cfg.run_cfg.task).setup_task(cfg=cfg)
    with tempfile.TemporaryDirectory() as folder:
        cfg.run_cfg.output_dir = folder
        runner = registry.get_runner_class(cfg.run_cfg.runner)(
            cfg, task, task.build_model(cfg), task.build_datasets(cfg), "bench"
        )
        runner.module.train()
        batches = runner.loader.epoch(0, args.warmup + args.steps)
        return {"work": args.cfg_path, **time_steps(runner, batches, args.warmup)}


def time_full_size(args: argparse.Namespace) -> list[dict]:
    """The fixed workloads with random weights at full size (or small), through the runner."""
    import torch

    from minigpt4.common import dist_utils
    from minigpt4.common.config import Config
    from minigpt4.runners import RunnerBase
    from minigpt4.tasks import ImageTextPretrainTask

    device = dist_utils.select_device("cuda")
    rows = []
    model = None
    for work in args.work:
        stage, batch_size = WORK[work]
        name = {1: "stage1_pretrain", 2: "stage2_finetune"}[stage]
        with tempfile.TemporaryDirectory() as folder:
            options = [*(args.options or []), f"run.output_dir={folder}", "run.num_workers=0"]
            cfg = Config(SimpleNamespace(cfg_path=TRAIN_CONFIGS / f"minigpt4_{name}.yaml", options=options))
            dtype = dist_utils.select_dtype(device, cfg.run_cfg.amp, cfg.run_cfg.amp_dtype)
            model = model or random_model(device, dtype, args.small)
            model.max_txt_len, model.end_sym = cfg.model_cfg.max_txt_len, " ."
            model.prompt_list = [" w" * 11 + "<ImageHere>" + " w" * 11] if stage == 2 else []
            datasets = {"random": {"train": RandomPairs(256)}}
            runner = RunnerBase(cfg, ImageTextPretrainTask(), model.train(), datasets, "bench")
            batches = random_batches(stage, batch_size, args.warmup + args.steps, device.type == "cuda")
            if device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            rows.append({"work": work, "dtype": str(dtype), **time_steps(runner, batches, args.warmup)})
    return rows


def time_steps(runner, batches, warmup: int) -> dict:
    """Median, least and most seconds of the steps after the warm-up, and the peak of the GPU's memory."""
    import torch

    from minigpt4.runners.prefetch import prefetch

    seconds, start = [], time.perf_counter()
    for samples in prefetch(batches, runner.module, runner.device):
        float(runner.train_step(samples, is_update=True))
        if runner.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds.append(now - start)
        start = now
    seconds = seconds[warmup:]
    row = {
        "median_s": round(statistics.median(seconds), 4),
        "min_s": round(min(seconds), 4),
        "max_s": round(max(seconds), 4),
    }
    if runner.device.type == "cuda":
        row["max_mem_MB"] = torch.cuda.max_memory_allocated() // 2**20
        row["reserved_MB"] = torch.cuda.max_memory_reserved() // 2**20
    return row


def time_baseline(path: str, work: list[str]) -> list[dict]:
    """The workloads in the way of another script, whose memory is free again afterwards."""
    import torch

    spec = importlib.util.spec_from_file_location("baseline", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model = script.Baseline()
    rows = [{"baseline": True, **script.measure(model, name)} for name in work]
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return rows


def random_model(device, dtype, small: bool):
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
        model = MiniGPT4(vit, QFormer(vit.embed_dim, **qformer), llm, WordTokenizer(), dtype=dtype)
    cast_matrices(vit, dtype)
    return model


class WordTokenizer:
    """One token a word, so that lengths are as wanted."""

    bos_token_id, eos_token_id = 1, 2

    def encode(self, text: str) -> list[int]:
        return [3 + hash(word) % (VOCABULARY - 3) for word in text.split()]


class RandomPairs:
    """A length is all that the runner's set-up asks of it: the batches are made beforehand."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self) -> int:
        return self.length


def random_batches(stage: int, batch_size: int, count: int, pin_memory: bool) -> list[dict]:
    """Batches on the host: random images (three sets in turn) and captions of the workload's lengths."""
    import torch

    low, high = (80, 160) if stage == 2 else (8, 24)
    rng = random.Random(1)
    images = [torch.randn(batch_size, 3, 224, 224) for _ in range(3)]
    images = [image.pin_memory() for image in images] if pin_memory else images
    return [
        {
            "image": images[i % 3],
            "text_input": [" ".join(["w"] * (rng.randint(low, high) - 1)) for _ in range(batch_size)],
        }
        for i in range(count)
    ]
