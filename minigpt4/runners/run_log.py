"""What a runner tells about its training in the log, in metrics.jsonl and to the trackers."""

import json
import logging
from collections import Counter
from typing import TYPE_CHECKING

from minigpt4.common import dist_utils
from minigpt4.common.text import pluralize
from minigpt4.datasets.loaders import left_out_counts, report_left_out
from minigpt4.runners import data
from minigpt4.runners.schedule import log_rates
from minigpt4.tracking.record import RunRecord
from minigpt4.tracking.run_files import without_passwords
from minigpt4.tracking.trackers import RunInfo

if TYPE_CHECKING:
    from minigpt4.runners.runner_base import RunnerBase


def record_of(runner: "RunnerBase") -> RunRecord:
    """The files and trackers of a run."""
    config = json.loads(without_passwords(json.dumps(runner.cfg.to_dict())))
    info = RunInfo(runner.run_id, runner.run.name or runner.run_id, str(runner.output_dir), config)
    return RunRecord(info, runner.run.trackers)


def log_plan(runner: "RunnerBase") -> None:
    """Log before training what is trained, on what, and for how long."""
    if runner.start_epoch >= runner.run.max_epoch:
        done = pluralize(runner.run.max_epoch, "epoch")
        logging.info("Nothing left to train: the checkpoint has done %s. Raise run.max_epoch to go on.", done)
        return
    log_rates(runner.module, runner.run)
    if dist_utils.is_main_process():
        data.log_samples(runner.cfg, runner.datasets, runner.module)
    data.log_data(runner.cfg, runner.datasets)
    logging.info("Start training")
    logging.info("Computing in %s on %s.", str(runner.dtype).removeprefix("torch."), runner.device)
    runner.eta.log_schedule()


def log_line(runner: "RunnerBase", item: int, values: dict[str, float]) -> None:
    """Record the values of a line of `MetricLogger`, whose rates are those of this rank."""
    values = {name: n * (runner.world_size if "_per_" in name else 1) for name, n in values.items()}
    if runner.health.grad_norm is not None:
        values["grad_norm"] = float(runner.health.grad_norm)
    runner.log(values, runner.health.digest)


def log_epoch(runner: "RunnerBase", epoch: int) -> None:
    """Report what was left out of an epoch, by all ranks, the shares of the datasets, and skipped updates."""
    left_out = sum(dist_utils.gather_objects(runner.progress.take_counts()), Counter())
    for line in report_left_out(left_out):
        logging.info("Epoch %d: %s", epoch, line)
    shares, values = runner.loader.shares(), left_out_counts(left_out) | runner.health.take_counts(epoch)
    if len(shares) > 1:
        batches = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        logging.info("Epoch %d: batches from %s.", epoch, batches)
        values |= {f"share/{name}": share for name, share in shares.items()}
    if values:
        runner.log(values)
