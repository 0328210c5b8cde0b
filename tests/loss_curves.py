"""The loss of every step of stage 1, on one rank or several, on the same samples: the curves must agree to rounding.

    python tests/loss_curves.py --out one.json                                        # 1 × 64
    python tests/loss_curves.py --reverse --against one.json                          # what rounding alone changes
    torchrun --nproc_per_node 2 tests/loss_curves.py --against one.json               # 2 × 32
    torchrun --nproc_per_node 4 tests/loss_curves.py --against one.json               # 4 × 16

Every rank makes the batches of 64 that a single rank would train on, crops included, and takes its part of each: with 4
ranks, every fourth sample. A point of the curve is the mean over the labels of all ranks, which the step minimises.
--reverse reverses the samples of each batch. This changes the sums only by rounding, and so shows its size. By default
the tiny model is trained (`make quickstart` makes its pictures), on a GPU if there is one, in 16 bit unless
run.amp=False. The exit status is 1 if the loss of a step differs by more than --tolerance.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

from minigpt4.common import dist_utils
from minigpt4.common.config import Config
from minigpt4.common.logger import setup_logger
from minigpt4.common.registry import registry
from minigpt4.datasets.loaders import TrainLoader
from minigpt4.runners.state import seed_everything

TINY = Path(__file__).resolve().parents[1] / "train_configs/minigpt4_tiny_stage1_pretrain.yaml"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg-path", default=TINY, metavar="FILE", help="training config without prompts (tiny)")
    parser.add_argument("--options", nargs="+", default=[], metavar="KEY=VALUE", help="settings, as for train.py")
    parser.add_argument("--batch", type=int, default=64, help="samples of a step, over all ranks (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="steps (%(default)s)")
    parser.add_argument("--reverse", action="store_true", help="reverse the samples of each batch")
    parser.add_argument("--out", metavar="FILE", help="write the curve to this file")
    parser.add_argument("--against", metavar="FILE", help="compare with the curve in this file")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="largest difference of a loss (%(default)s)")
    return parser.parse_args(argv)


class Shares:
    """Replaces a rank's loader: gives this rank's part of each batch of `joint`, the loader of a single rank."""

    def __init__(self, joint: TrainLoader, reverse: bool):
        self.joint, self.reverse = joint, reverse
        self.take_left_out, self.shares, self.use_next = joint.take_left_out, joint.shares, joint.use_next
        self.take_ids = joint.take_ids

    def epoch(self, epoch: int, num_batches: int, first: int = 0) -> Iterator[dict]:
        rank, ranks = dist_utils.get_rank(), dist_utils.get_world_size()
        for batch in self.joint.epoch(epoch, num_batches, first):
            order = list(range(len(batch["text_input"])))[:: -1 if self.reverse else 1][rank::ranks]
            yield {
                key: value[order] if isinstance(value, torch.Tensor) else [value[i] for i in order]
                for key, value in batch.items()
            }


def loss_curve(cfg: Config, batch: int, reverse: bool = False) -> list[float]:
    """The loss of each step of an epoch of `cfg`, equal on all ranks."""
    run = cfg.run_cfg
    run.batch_size_train, left = divmod(batch, dist_utils.get_world_size())
    if left:
        sys.exit(f"--batch {batch} cannot be shared evenly by {dist_utils.get_world_size()} ranks.")
    if cfg.model_cfg.prompt_path:
        sys.exit("Each rank draws its own prompts: give a config of stage 1, without model.prompt_path.")
    seed_everything(run.seed)
    task = registry.get_task_class(run.task).setup_task(cfg=cfg)
    datasets, model = task.build_datasets(cfg), task.build_model(cfg)
    runner = registry.get_runner_class(run.runner)(cfg, task, model, datasets, "curve")
    train = {name: splits["train"] for name, splits in datasets.items()}
    ratios = {name: cfg.datasets_cfg[name].sample_ratio for name in train}
    runner.loader = Shares(TrainLoader(train, ratios, batch, run.num_workers, run.seed), reverse)
    losses, train_step = [], task.train_step

    def recording(model, samples):
        output = train_step(model, samples)
        losses.append((float(output["loss"].detach()) * output["num_labels"], output["num_labels"]))
        return output

    task.train_step = recording
    runner.train_epoch(0)
    sums, labels = dist_utils.all_reduce_sum(torch.tensor(losses, dtype=torch.float64)).T
    return (sums / labels).tolist()


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    setup_logger()
    with tempfile.TemporaryDirectory() as folder:
        options = ["run.num_workers=0", *args.options, f"run.iters_per_epoch={args.steps}", f"run.output_dir={folder}"]
        cfg = Config(SimpleNamespace(cfg_path=args.cfg_path, options=options))
        cfg.check_paths(datasets=True)
        device = dist_utils.select_device(cfg.run_cfg.device)
        dist_utils.init_process_group(device, cfg.run_cfg.dist_backend, cfg.run_cfg.distributed)
        try:
            curve = loss_curve(cfg, args.batch, args.reverse)
            ranks, first = dist_utils.get_world_size(), dist_utils.is_main_process()
        finally:
            dist_utils.destroy_process_group()
    if not first:
        return 0
    where = f"at the first of {len(curve)} steps, {curve[-1]:.4f} at the last"
    print(f"{ranks} × {args.batch // ranks}: loss {curve[0]:.4f} {where}")
    if args.out:
        Path(args.out).write_text(json.dumps(curve))
    return compare(curve, json.loads(Path(args.against).read_text()), args.tolerance) if args.against else 0


def compare(curve: list[float], other: list[float], tolerance: float) -> int:
    """Print the largest difference of the curves. Returns the exit status: 1 if it is more than `tolerance`."""
    differences = [abs(a - b) for a, b in zip(curve, other, strict=True)]
    worst = max(range(len(curve)), key=lambda i: (math.isnan(differences[i]), differences[i]))
    mean = sum(differences) / len(differences)
    print(f"largest difference {differences[worst]:.1e}, at step {worst}; mean {mean:.1e}")
    return int(not differences[worst] <= tolerance)


if __name__ == "__main__":
    sys.exit(main())
