"""python -m minigpt4 doctor: find what is wrong with a run before its weights are loaded.

    python -m minigpt4 doctor --cfg-path train_configs/minigpt4_stage1_pretrain.yaml
    python -m minigpt4 doctor --cfg-path train_configs/minigpt4_stage1_pretrain.yaml --gpus 4 --step-time 0.34
    python -m minigpt4 doctor --cfg-path eval_configs/minigpt4_eval.yaml --json
    python -m minigpt4 doctor --cfg-path train_configs/minigpt4_stage2_finetune.yaml --probe     # real steps

Checks every file that the config names, shapes, tokenizer and template, and the machine, and estimates memory and time.
Paths, keys and the machine come first, within a second; the loaders check the rest if those have no errors.
Exit status: 0 for no errors (warnings are allowed), 1 for errors and for a check that could not be made, 2 for a config
that cannot be read.
"""

import argparse

from minigpt4.cli.arguments import add_config_arguments
from minigpt4.common.commands import check_positive, command_parser
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import UnknownNameError
from minigpt4.common.text import pluralize


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser("doctor", __doc__)
    add_config_arguments(parser, "YAML file of a training run or of a chat")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="processes of the run (%(default)s)")
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GB", help="estimate for a GPU of this size instead of this machine's"
    )
    parser.add_argument("--step-time", type=float, metavar="S", help="seconds a batch takes, to estimate hours")
    parser.add_argument(
        "--probe", action="store_true", help="then load everything and take three steps with the longest batch"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object for each diagnostic")
    args = parser.parse_args(argv)
    check_positive(parser, args, ("gpus", "gpu_memory", "step_time"))
    return args


def main(argv: list[str] | None = None) -> int:
    """Print the diagnostics. Returns the exit status."""
    args = parse_args(argv)
    from minigpt4.doctor.checks import examine, has_errors
    from minigpt4.doctor.diagnostic import ERROR, NOT_MADE, WARNING, as_json, as_text, error
    from minigpt4.doctor.machine import imagined_gpu, list_gpus
    from minigpt4.doctor.run_context import RunContext

    try:
        cfg = Config(args)
    except (ConfigError, UnknownNameError) as mistake:
        print(as_json(error("config", str(mistake))) if args.json else mistake)
        return 2
    gpus = [imagined_gpu(args.gpu_memory)] * args.gpus if args.gpu_memory else list_gpus()
    context = RunContext(cfg, is_training(cfg), gpus, args.gpus, step_time=args.step_time)
    diagnostics = examine(context)
    broken = has_errors(diagnostics)
    if args.probe and not broken:
        from minigpt4.benchmarks.probe import probe

        diagnostics += probe(context)
    if args.json:
        for diagnostic in diagnostics:
            print(as_json(diagnostic))
    else:
        print(as_text(diagnostics))
        counts = [sum(diagnostic.status == status for diagnostic in diagnostics) for status in (ERROR, WARNING)]
        print(f"\n{pluralize(counts[0], 'error')}, {pluralize(counts[1], 'warning')}.")
        if args.probe and broken:
            print("No step was taken: the errors come first.")
    return int(has_errors(diagnostics) or any(each.fix == NOT_MADE for each in diagnostics))


def is_training(cfg: Config) -> bool:
    """Whether the file describes a run of train.py. A chat's file sets none of the keys that only training needs."""
    keys = ("max_epoch", "iters_per_epoch", "init_lr", "batch_size_train", "train_splits", "valid_splits", "output_dir")
    own_data = any(dataset.get("builder") for dataset in cfg.datasets_cfg.values())
    return own_data or any(cfg.origin(f"run.{key}") != "the defaults" for key in keys)
