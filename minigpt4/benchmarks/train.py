"""python -m minigpt4 bench train: time training steps.

    python -m minigpt4 bench train                             # full size, random weights: S1/16, S1/64, S2/12 on a GPU
    python -m minigpt4 bench train --baseline FILE             # beside another script's `Baseline` and `measure`
    python -m minigpt4 bench train --compare run.compile=false # two settings in one process, step by step in turn
    python -m minigpt4 bench train --cfg-path train_configs/minigpt4_tiny_stage1_pretrain.yaml   # a config, its data
    python -m minigpt4 bench train --compare run.fp8=True --warmup 0 --steps 100   # what a setting does to the loss
    torchrun --nproc_per_node 4 -m minigpt4 bench train        # all of this on several GPUs, but for --baseline

A step is: images on the host, forward, backward, optimiser step, loss read. Captions have 8 to 24 tokens in stage 1
and 80 to 160 in stage 2, drawn with seed 1; stage 2 has a prompt of 22 tokens around the image. Where the time goes is
seen in more steps after the timed ones, each part of which is waited for: their sum is more than a step's time.
Two settings take the same batches and start from the same weights; the difference of their losses, warm-up included, is
what they compute differently. (With several prompts, a config's steps draw them apart: model.prompt_path=null.)

Under torchrun each rank trains on its own batches, of the size named, as even in length as a run's are
(`datasets/length_balancing.py`). The first prints: the time of the slowest rank, images and tokens a second of all
ranks, the largest memory, and rank 0's parts, the exchange in backward_s. Also
    alone_s        one rank's step while the others wait, the mean over the ranks
    efficiency     alone_s / median_s: the rate of N ranks against N times that of one
    no_exchange_s  a step of all ranks at once that exchanges nothing, timed in turn with those that do
    communication  the share of median_s that this saves
What efficiency lacks beside communication, ranks with shorter batches wait for the others, or all share a machine.
"""

import argparse
import contextlib
import gc
import importlib.util
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from minigpt4.benchmarks.step_timer import APART, StepTimer
from minigpt4.benchmarks.synthetic import RandomPairs, random_batches, random_model
from minigpt4.common.errors import ConfigError

WORK = {"S1/16": (1, 16), "S1/64": (1, 64), "S2/12": (2, 12)}
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
        # torchrun starts several processes, and an error of the parser would be told by each
        raise ConfigError(f"--steps {args.steps} must be at least 1, --warmup {args.warmup} at least 0.")
    return args


def main(argv: list[str] | None = None) -> int:
    """Time what the arguments name, and print a line for each workload.

    Raises ConfigError for numbers of steps that cannot be, and for a baseline under torchrun.
    """
    args = parse_args(argv)
    if args.baseline and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("--baseline times a script that knows one process. Run it without torchrun.")
    from minigpt4.common import dist_utils

    if args.cfg_path:
        rows = time_config(args)
    else:
        rows = itertools.chain(time_baseline(args.baseline, args.work) if args.baseline else [], time_full_size(args))
    try:
        for row in rows:
            if dist_utils.is_main_process():
                report(row, args.json)
    finally:
        dist_utils.destroy_process_group()
    return 0


def report(row: dict, as_json: bool) -> None:
    print(json.dumps(row) if as_json else "  ".join(f"{key}: {value}" for key, value in row.items()), flush=True)


def time_config(args: argparse.Namespace) -> Iterator[dict]:
    """Steps of a training config, with its own model and data, through its own runner."""
    from minigpt4.common.config import Config
    from minigpt4.common.registry import registry
    from minigpt4.runners.state import seed_everything

    cfgs = [Config(SimpleNamespace(cfg_path=args.cfg_path, options=options)) for options in settings(args)]
    for cfg in cfgs:
        cfg.check_paths(datasets=True)
    join_group(cfgs[0].run_cfg)
    with contextlib.ExitStack() as stack:
        runners = []
        for cfg in cfgs:
            cfg.run_cfg.output_dir = stack.enter_context(tempfile.TemporaryDirectory())
            task = registry.get_task_class(cfg.run_cfg.task).setup_task(cfg=cfg)
            runner_class = registry.get_runner_class(cfg.run_cfg.runner)
            seed_everything(cfg.run_cfg.seed)  # two settings start from the same weights
            runner = runner_class(cfg, task, task.build_model(cfg), task.build_datasets(cfg), "bench")
            runners.append((runner, runner.loader.epoch(0, batches_needed(args))))
        yield from time_in_turn(args, args.cfg_path, runners)


def time_full_size(args: argparse.Namespace) -> Iterator[dict]:
    """The fixed workloads with random weights at full size (or small), through the runner."""
    from minigpt4.common import dist_utils
    from minigpt4.common.config import Config
    from minigpt4.runners import RunnerBase
    from minigpt4.tasks import ImageTextPretrainTask

    first = Config(SimpleNamespace(cfg_path=TRAIN_CONFIGS / "minigpt4_stage1_pretrain.yaml", options=args.options))
    device = join_group(first.run_cfg)
    if device.type == "cpu" and not args.small:
        raise ConfigError(
            "The fixed workloads are of full size, 31 GB in float32, and there is no GPU. Add --small, or time a "
            "config: --cfg-path train_configs/minigpt4_tiny_stage1_pretrain.yaml"
        )
    rank, ranks = dist_utils.get_rank(), dist_utils.get_world_size()
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
                load_in = cfg.model_cfg.load_in or args.load_in
                model = random_model(device, dtype, args.small, load_in, cfg.model_cfg.llm_grad_checkpoint)
                model.max_txt_len, model.end_sym = cfg.model_cfg.max_txt_len, " ."
                model.prompt_list = [" w" * 11 + "<ImageHere>" + " w" * 11] if stage == 2 else []
                datasets = {"random": {"train": RandomPairs(256)}}
                runner = RunnerBase(cfg, ImageTextPretrainTask(), model.train(), datasets, "bench")
                # with exchange and without, each batch is taken twice
                batches = random_batches(stage, batch_size, batches_needed(args), rank, ranks, repeat=min(ranks, 2))
                runners.append((runner, batches))
            del runner, model
            yield from time_in_turn(args, work, runners)
            runners.clear()


def join_group(run):
    """The device of this process, after it has joined the others that torchrun started, if there are any."""
    from minigpt4.common import dist_utils

    device = dist_utils.select_device(run.device)
    dist_utils.init_process_group(device, run.dist_backend, run.distributed)
    return device


def settings(args: argparse.Namespace) -> list[list[str]]:
    """The options of each setting that is timed: one, or with --compare two."""
    first = args.options or []
    return [first, [*first, *args.compare]] if args.compare else [first]


def batches_needed(args: argparse.Namespace) -> int:
    """How many batches the steps of a runner take: on several ranks with exchange, without, and alone."""
    from minigpt4.common import dist_utils

    return (args.warmup + args.steps) * (3 if dist_utils.get_world_size() > 1 else 1) + APART


def time_in_turn(args: argparse.Namespace, work: str, runners: list) -> Iterator[dict]:
    """Rows for the runners' steps on their batches, one step of each in turn."""
    from minigpt4.benchmarks.scaling import ScalingTimer
    from minigpt4.common import dist_utils
    from minigpt4.runners.prefetch import prefetch

    several = dist_utils.get_world_size() > 1
    with contextlib.ExitStack() as stack:
        timers = []
        for runner, batches in runners:
            runner.module.train()
            ready = stack.enter_context(contextlib.closing(prefetch(batches, runner.module, runner.device)))
            timers.append((ScalingTimer if several else StepTimer)(runner, ready))
        for _ in range(args.warmup + args.steps):
            for timer in timers:
                timer.step()
        for timer in timers:
            timer.note_memory()
            for _ in range(APART):
                timer.profiled_step()
            if several:
                timer.step_alone(args.warmup + args.steps)
    for timer, options in zip(timers, settings(args), strict=True):
        yield {"work": work, "options": " ".join(options), **timer.row(args.warmup)}
    if len(timers) == 2:
        first, second = (timer.seconds[args.warmup :] for timer in timers)
        ratios = [b / a for a, b in zip(first, second, strict=True)]
        gaps = [abs(b - a) for a, b in zip(*(timer.losses for timer in timers), strict=True)]
        yield {
            "work": work,
            "second / first, median of pairs": round(statistics.median(ratios), 3),
            "loss difference, mean of pairs": round(statistics.mean(gaps), 5),
        }


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
