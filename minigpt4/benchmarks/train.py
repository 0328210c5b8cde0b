"""python -m minigpt4 bench train: time training steps.

    python -m minigpt4 bench train                             # full size, random weights: S1/16, S1/64, S2/12 on a GPU
    python -m minigpt4 bench train --baseline FILE             # beside another script's `Baseline` and `measure`
    python -m minigpt4 bench train --compare run.compile=false # two settings in one process, step by step in turn
    python -m minigpt4 bench train --cfg-path train_configs/minigpt4_tiny_stage1_pretrain.yaml   # a config, its data
    python -m minigpt4 bench train --compare run.fp8=True --warmup 0 --steps 100   # how a setting changes the loss
    python -m minigpt4 bench train --work S2/12 --compare 'model.lora={r: 64, dropout: 0}'   # LoRA adapters, or none
    torchrun --nproc_per_node 4 -m minigpt4 bench train        # any of these on several GPUs, except --baseline

A step is: images on the host, forward, backward, optimizer step, loss read. Captions have 8 to 24 tokens in stage 1
and 80 to 160 in stage 2, drawn with seed 1; in stage 2 a prompt of 22 tokens surrounds the image. After these steps,
others are timed part by part. Because the host waits for each part, the parts add up to more than a step.
With --compare, both settings take the same batches and start from the same weights, so their losses differ by what the
settings change, warm-up included. (A config with several prompts draws them for each: set model.prompt_path=null.)

Under torchrun each rank trains on its own batches, of the size named and balanced in length as a run's batches are
(`datasets/length_balancing.py`). The first rank prints the time of the slowest rank, images and tokens a second of all
ranks, the largest memory, and rank 0's parts, with the exchange in backward_s. Also
    alone_s        one rank's step while the others wait, the mean over the ranks
    efficiency     alone_s / median_s: the rate of N ranks against N times the rate of one
    no_exchange_s  a step of all ranks at once without exchange; such steps alternate with the others
    communication  the share of median_s that the exchange takes
If efficiency is lower than communication explains, ranks with shorter batches wait for the others, or the ranks compete
for the machine.
"""

import argparse
import contextlib
import os
import runpy
import statistics
import tempfile
from collections.abc import Iterator

from minigpt4.benchmarks.harness import bench_parser, free_memory, peak_memory, report
from minigpt4.benchmarks.step_timer import PROFILED_STEPS, StepTimer
from minigpt4.benchmarks.synthetic import ROOT, STAGE_CONFIGS, WORKLOADS, load_config, random_batches, random_model
from minigpt4.common.errors import ConfigError


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = bench_parser("train", __doc__)
    parser.add_argument("--work", nargs="+", default=list(WORKLOADS), choices=WORKLOADS, help="workloads of full size")
    parser.add_argument("--cfg-path", metavar="FILE", help="time this training config on its own data instead")
    parser.add_argument("--options", nargs="+", metavar="KEY=VALUE", help="settings, as for train.py")
    parser.add_argument("--compare", nargs="+", metavar="KEY=VALUE", help="time these settings too, in turn")
    parser.add_argument("--load-in", default="16bit", choices=("16bit", "8bit", "4bit"), help="of the language model")
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: 20)")
    parser.add_argument("--warmup", type=int, default=20, help="steps before the timed ones (default: 20)")
    parser.add_argument("--small", action="store_true", help="a small random model, to try the script on a CPU")
    parser.add_argument("--baseline", metavar="FILE", help="script with `Baseline` and `measure(model, work)`")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.warmup < 0:
        # Under torchrun, every process would print an error of the parser.
        raise ConfigError(f"--steps {args.steps} must be at least 1, --warmup {args.warmup} at least 0.")
    return args


def main(argv: list[str]) -> int:
    """Time the steps that the arguments ask for, and print a line for each workload.

    Raises ConfigError for an impossible number of steps, and for a baseline under torchrun.
    """
    args = parse_args(argv)
    if args.baseline and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError("--baseline times a script that knows one process. Run it without torchrun.")
    from minigpt4.common import dist_utils

    if args.baseline and not args.cfg_path:
        for row in time_baseline(args.baseline, args.work):
            report(row, args.json)
    run = load_config(args.cfg_path or ROOT / STAGE_CONFIGS[1], args.options).run_cfg
    with dist_utils.process_group(run) as device, tempfile.TemporaryDirectory() as folder:
        for row in time_config(args, folder) if args.cfg_path else time_full_size(args, folder, device):
            if dist_utils.is_main_process():
                report(row, args.json)
    return 0


def time_config(args: argparse.Namespace, folder: str) -> Iterator[dict]:
    """Time a training config: its own model, data, task and runner. folder: for the runners' files."""
    from minigpt4.common.registry import registry
    from minigpt4.runners.state import seed_everything

    cfgs = [load_config(args.cfg_path, [*options, output_option(folder)]) for options in settings(args)]
    for cfg in cfgs:
        cfg.check_paths(datasets=True)
    runners = []
    for cfg in cfgs:
        task = registry.get_task_class(cfg.run_cfg.task).setup_task(cfg=cfg)
        runner_class = registry.get_runner_class(cfg.run_cfg.runner)
        seed_everything(cfg.run_cfg.seed)  # both settings start from the same weights
        runner = runner_class(cfg, task, task.build_model(cfg), task.build_datasets(cfg), "bench")
        runners.append((runner, runner.loader.epoch(0, batches_needed(args))))
    yield from time_runners(args, args.cfg_path, runners)


def time_full_size(args: argparse.Namespace, folder: str, device) -> Iterator[dict]:
    """Time the fixed workloads: random weights at full size (or small), through the runner."""
    from minigpt4.common import dist_utils

    if device.type == "cpu" and not args.small:
        raise ConfigError(
            "The fixed workloads are of full size, 31 GB in float32, and there is no GPU. Add --small, or time a "
            "config: --cfg-path train_configs/minigpt4_tiny_stage1_pretrain.yaml"
        )
    rank, ranks = dist_utils.get_rank(), dist_utils.get_world_size()
    for work in args.work:
        free_memory()
        stage, batch_size = WORKLOADS[work]
        # Several ranks take each batch twice: with exchange and without.
        work_of_rank = stage, batch_size, batches_needed(args), rank, ranks, min(ranks, 2)
        runners = (
            (random_runner(args, stage, [*options, output_option(folder)], device), random_batches(*work_of_rank))
            for options in settings(args)
        )
        yield from time_runners(args, work, list(runners))


def random_runner(args: argparse.Namespace, stage: int, options: list[str], device):
    """A runner with the stage's settings, and a model with random weights on `device`."""
    from minigpt4.common import dist_utils
    from minigpt4.models import loading
    from minigpt4.runners import RunnerBase
    from minigpt4.tasks import ImageTextPretrainTask

    cfg = load_config(ROOT / STAGE_CONFIGS[stage], [*options, "run.num_workers=0"])
    dtype = dist_utils.select_dtype(device, cfg.run_cfg.amp, cfg.run_cfg.amp_dtype)
    load_in = cfg.model_cfg.load_in or args.load_in
    model = random_model(device, dtype, args.small, load_in, cfg.model_cfg.llm_grad_checkpoint)
    loading.add_adapters(model, cfg.model_cfg)
    model.max_txt_len, model.end_sym = cfg.model_cfg.max_txt_len, " ."
    model.prompt_list = [" w" * 11 + "<ImageHere>" + " w" * 11] if stage == 2 else []
    datasets = {"random": {"train": [None] * 256}}  # the runner needs their length only
    return RunnerBase(cfg, ImageTextPretrainTask(), model.train(), datasets, "bench")


def settings(args: argparse.Namespace) -> list[list[str]]:
    """The options of each setting that is timed: one, or two with --compare."""
    first = args.options or []
    return [first, [*first, *args.compare]] if args.compare else [first]


def output_option(folder: str) -> str:
    """The option by which a runner gets a folder of its own in `folder`."""
    return f"run.output_dir={tempfile.mkdtemp(dir=folder)}"


def batches_needed(args: argparse.Namespace) -> int:
    """How many batches a runner's steps take. Several ranks step in three ways."""
    from minigpt4.common import dist_utils

    return (args.warmup + args.steps) * (3 if dist_utils.get_world_size() > 1 else 1) + PROFILED_STEPS


def time_runners(args: argparse.Namespace, work: str, runners: list[tuple]) -> Iterator[dict]:
    """A row for each runner, and one that compares them if there are two. They take their steps in turn.

    runners: pairs of a runner and its batches.
    """
    from minigpt4.benchmarks.scaling import ScalingTimer
    from minigpt4.common import dist_utils
    from minigpt4.runners.prefetch import prefetch

    several, count = dist_utils.get_world_size() > 1, args.warmup + args.steps
    timer_class = ScalingTimer if several else StepTimer
    with contextlib.ExitStack() as stack:
        timers = []
        for runner, batches in runners:
            runner.module.train()
            ready = stack.enter_context(contextlib.closing(prefetch(batches, runner.module, runner.device)))
            timers.append(timer_class(runner, ready))
        for _ in range(count):
            for timer in timers:
                timer.step()
        for timer in timers:
            timer.memory = peak_memory(timer.device)
            for _ in range(PROFILED_STEPS):
                timer.profiled_step()
            if several:
                timer.step_alone(count)
    for timer, options in zip(timers, settings(args), strict=True):
        yield {"work": work, "options": " ".join(options), **timer.summary(args.warmup)}
    if len(timers) == 2:
        yield {"work": work, **compare(*timers, args.warmup)}


def compare(first: StepTimer, second: StepTimer, warmup: int) -> dict:
    """How two timers differ in seconds (after the warm-up) and in losses (of all steps)."""
    pairs = zip(first.seconds[warmup:], second.seconds[warmup:], strict=True)
    losses = zip(first.losses, second.losses, strict=True)
    return {
        "second / first, median of pairs": round(statistics.median(b / a for a, b in pairs), 3),
        "loss difference, mean of pairs": round(statistics.mean(abs(b - a) for a, b in losses), 5),
    }


def time_baseline(path: str, work: list[str]) -> Iterator[dict]:
    """Time the workloads with another script's `Baseline`, whose memory is freed afterwards."""
    script = runpy.run_path(path)
    model = script["Baseline"]()
    for name in work:
        yield {"baseline": True, **script["measure"](model, name)}
