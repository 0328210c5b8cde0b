"""The training loop: `train` over `train_epoch` over `train_step` over `optimizer_step`."""

import contextlib
import datetime
import json
import logging
import time
import warnings
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from minigpt4.common import checkpoint, dist_utils
from minigpt4.common.logger import MetricLogger
from minigpt4.common.optims import create_optimizer
from minigpt4.common.registry import registry
from minigpt4.datasets.loaders import TrainLoader, eval_loader
from minigpt4.runners.state import restore_rng_states, rng_states, to_device


@registry.register_runner("runner_base")
class RunnerBase:
    """Trains `model` on `datasets`, one process a GPU.

    Args:
        cfg: the run's `Config`.
        task: takes a step with a batch.
        model: lies on the rank's device already.
        datasets: {dataset name: {split: dataset}}.
        job_id: name of the run's folder in `run.output_dir`; the same on every rank.

    Raises:
        ValueError: a split that no dataset has, a dataset smaller than a batch, nothing to train.
        FileExistsError: the folder exists; a run is never overwritten.
    """

    def __init__(self, cfg, task, model, datasets: dict, job_id: str):
        self.cfg, self.run, self.task, self.datasets = cfg, cfg.run_cfg, task, datasets
        self.module = self.model = model  # `model` is what is called: DDP around the module when there are ranks
        self.device = model.device
        self.dtype = dist_utils.select_dtype(self.device, self.run.amp, self.run.amp_dtype)
        self.world_size = dist_utils.get_world_size()
        self.output_dir = Path(self.run.output_dir) / job_id
        self.start_epoch, self.best_metric, self.num_labels = 0, float("-inf"), 0
        _check_settings(self.run)
        for split in (*self.run.valid_splits, *self.run.test_splits):
            self._split(split)
        if not self.run.evaluate:
            self._prepare_training()
        if dist_utils.is_main_process():
            self.output_dir.mkdir(parents=True)
            self._append_log(cfg.to_dict(), indent=4)

    def _prepare_training(self) -> None:
        run = self.run
        datasets = {name: dataset for split in run.train_splits for name, dataset in self._split(split).items()}
        self.loader = TrainLoader(
            datasets,
            {name: section.sample_ratio for name, section in self.cfg.datasets_cfg.items()},
            run.batch_size_train,
            run.num_workers,
            run.seed,
            rank=dist_utils.get_rank(),
            world_size=self.world_size,
            pin_memory=self.device.type == "cuda",
        )
        self.iters_per_epoch = run.iters_per_epoch or self._batches_per_pass(datasets)
        self.optimizer = create_optimizer(self.module, run.init_lr, run.weight_decay, run.beta2)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.lr_sched = registry.get_lr_scheduler_class(run.lr_sched)(
            self.optimizer,
            run.max_epoch,
            self.iters_per_epoch,
            run.min_lr,
            run.init_lr,
            warmup_steps=run.warmup_steps,
            warmup_start_lr=run.warmup_lr,
            decay_rate=run.lr_decay_rate,
        )
        if run.resume_ckpt_path:
            self._resume(checkpoint.resolve(run.resume_ckpt_path))
        if self.world_size > 1:
            self.model = self._distributed()

    def train(self) -> None:
        """Train the epochs that are left, with a checkpoint after each; then evaluate the test splits."""
        start = time.time()
        if not self.run.evaluate:
            if self.start_epoch >= self.run.max_epoch:
                logging.info("Nothing left to train: the checkpoint has done all %d epochs.", self.run.max_epoch)
            for epoch in range(self.start_epoch, self.run.max_epoch):
                logging.info("Start training epoch %d, %d iters per inner epoch.", epoch, self.iters_per_epoch)
                self._log_stats("train", self.train_epoch(epoch))
                is_best = self._validate()
                self.save_checkpoint(epoch, is_best)
        for split in self.run.test_splits:
            self._log_stats(split, {"loss": self.evaluate(split)})
        logging.info("Training time %s", datetime.timedelta(seconds=int(time.time() - start)))

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Take `iters_per_epoch` steps; returns the epoch's mean learning rate and loss."""
        self.model.train()
        metrics = MetricLogger()
        batches = self.loader.epoch(epoch, self.iters_per_epoch)
        header = f"Train: data epoch: [{epoch}]"
        for i, samples in enumerate(metrics.log_every(batches, self.iters_per_epoch, self.run.log_freq, header)):
            self.lr_sched.step(cur_epoch=epoch, cur_step=i)
            is_update = (i + 1) % self.run.accum_grad_iters == 0 or i + 1 == self.iters_per_epoch
            loss = self.train_step(samples, is_update)
            metrics.update(lr=self.optimizer.param_groups[0]["lr"], loss=loss)
        stats = metrics.global_avg()
        logging.info("Averaged stats: %s", "  ".join(f"{name}: {value:.4f}" for name, value in stats.items()))
        return stats

    def train_step(self, samples: dict, is_update: bool) -> torch.Tensor:
        """Forward and backward of a micro-batch, and at the last one of a step the update. Returns the loss."""
        samples = to_device(samples, self.device)
        # Ranks exchange gradients at the last micro-batch only.
        with contextlib.nullcontext() if is_update or self.world_size == 1 else self.model.no_sync():
            with self._autocast():
                output = self.task.train_step(self.model, samples)
            # Gradients of sums over labels add up over micro-batches and ranks; `optimizer_step` makes them a mean.
            num_labels = output.get("num_labels", 1)
            self.scaler.scale(output["loss"] * num_labels).backward()
        self.num_labels += num_labels
        if is_update:
            self.optimizer_step()
        return output["loss"].detach()

    def optimizer_step(self) -> None:
        """Turn the summed gradients into the mean over all labels of the step, and update the weights."""
        self.scaler.unscale_(self.optimizer)
        num_labels = dist_utils.all_reduce_sum(torch.tensor(float(self.num_labels), device=self.device))
        for parameter in self._trainable().values():
            if parameter.grad is not None:
                parameter.grad.mul_(self.world_size / num_labels)  # DDP has divided by the number of ranks
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.num_labels = 0

    @torch.no_grad()
    def evaluate(self, split: str) -> float:
        """The mean loss over all labels of a split, every sample once, whatever the number of ranks."""
        self.module.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for dataset in self._split(split).values():
            for samples in eval_loader(
                dataset, self.run.batch_size_eval, self.run.num_workers, dist_utils.get_rank(), self.world_size
            ):
                with self._autocast():
                    output = self.task.valid_step(self.module, to_device(samples, self.device))
                num_labels = output.get("num_labels", 1)
                total += torch.tensor([float(output["loss"]) * num_labels, num_labels], dtype=torch.float64)
        loss, num_labels = dist_utils.all_reduce_sum(total).tolist()
        return loss / max(num_labels, 1)

    def save_checkpoint(self, epoch: int, is_best: bool = False) -> None:
        """Write checkpoint_<epoch>.pth, and the same as checkpoint_best.pth if it is the best so far."""
        states = rng_states()
        if not dist_utils.is_main_process():
            return
        content = {
            "model": {name: parameter.detach() for name, parameter in self._trainable().items()},
            "optimizer": self.optimizer.state_dict(),
            "config": self.cfg.to_dict(),
            "scaler": self.scaler.state_dict() if self.scaler.is_enabled() else None,
            "epoch": epoch,
            "rng": states,
            "best_metric": self.best_metric,
        }
        for name in [f"checkpoint_{epoch}.pth", *(["checkpoint_best.pth"] if is_best else [])]:
            logging.info("Saving checkpoint at epoch %d to %s.", epoch, self.output_dir / name)
            checkpoint.save(content, self.output_dir / name)

    def _resume(self, path: Path) -> None:
        """Go on after the epoch that `path` was written at: weights, optimiser, scaler, random states, best metric."""
        content = checkpoint.read_file(path)
        checkpoint.load_weights(self.module, content["model"], str(path), required=set(self._trainable()))
        self.optimizer.load_state_dict(content["optimizer"])
        if content.get("scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(content["scaler"])
        self.start_epoch = content["epoch"] + 1
        self.best_metric = content.get("best_metric", self.best_metric)
        restore_rng_states(content.get("rng"))
        logging.info("Resuming after epoch %d from %s.", content["epoch"], path)

    def _validate(self) -> bool:
        """Evaluate the validation splits; True if the metric is the best so far."""
        if not self.run.valid_splits:
            return False
        losses = {split: self.evaluate(split) for split in self.run.valid_splits}
        for split, loss in losses.items():
            self._log_stats(split, {"loss": loss})
        metric = self.task.agg_metrics(sum(losses.values()) / len(losses))
        is_best, self.best_metric = metric > self.best_metric, max(metric, self.best_metric)
        return is_best

    def _split(self, split: str) -> dict:
        """{dataset name: dataset} of those that have the split. Raises ValueError when none has."""
        found = {name: splits[split] for name, splits in self.datasets.items() if split in splits}
        if not found:
            known = {name: list(splits) for name, splits in self.datasets.items()}
            raise ValueError(f"No dataset has the split {split!r}; there are {known}. Change run.*_splits.")
        return found

    def _distributed(self) -> DistributedDataParallel:
        """The module with gradients exchanged between ranks, all of which start from rank 0's trainable weights.

        Frozen weights are the same everywhere already; sending 7B of them around would only take time.
        """
        for parameter in self._trainable().values():
            torch.distributed.broadcast(parameter.data, src=0)
        with warnings.catch_warnings():
            # torch 2.14 announces another name for broadcast_buffers, one that torch 2.11 does not have
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(self.module, init_sync=False, broadcast_buffers=False)

    def _batches_per_pass(self, datasets: dict) -> int:
        """Batches that make one pass over the data. Raises ValueError for a stream, which has no end."""
        streams = [name for name, dataset in datasets.items() if isinstance(dataset, IterableDataset)]
        if streams:
            raise ValueError(
                f"{', '.join(streams)}: a stream of shards has no end, so run.iters_per_epoch must say how long an "
                "epoch is. For example: --options run.iters_per_epoch=500"
            )
        return sum(map(len, datasets.values())) // (self.run.batch_size_train * self.world_size)

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def _autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _log_stats(self, split: str, stats: dict[str, float]) -> None:
        if split != "train":
            logging.info("%s: %s", split, "  ".join(f"{name}: {value:.4f}" for name, value in stats.items()))
        self._append_log({f"{split}_{name}": f"{value:.3f}" for name, value in stats.items()})

    def _append_log(self, entry: dict, indent: int | None = None) -> None:
        if dist_utils.is_main_process():
            with open(self.output_dir / "log.txt", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry, indent=indent) + "\n")


def _check_settings(run) -> None:
    """Raise ValueError for numbers that no run can have, before anything is written."""
    for name in ("batch_size_train", "batch_size_eval", "accum_grad_iters", "log_freq", "max_epoch", "iters_per_epoch"):
        value = run[name]
        if value is not None and value < 1:
            raise ValueError(f"run.{name}={value} must be at least 1.")
    if run.num_workers < 0:
        raise ValueError(f"run.num_workers={run.num_workers} must be at least 0.")
    if run.evaluate and not run.test_splits:
        raise ValueError("run.evaluate=True needs run.test_splits, the splits to evaluate. For example: [test]")
