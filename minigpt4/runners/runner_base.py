"""The training loop: `train` over `train_epoch` over `train_step` over `optimizer_step`."""

import contextlib
import datetime
import json
import logging
import math
import time
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from minigpt4.common import dist_utils
from minigpt4.common.config import Config
from minigpt4.common.contracts import Task
from minigpt4.common.errors import ConfigError
from minigpt4.common.logger import MetricLogger
from minigpt4.common.optims import create_optimizer
from minigpt4.common.registry import registry
from minigpt4.common.text import pluralize
from minigpt4.datasets.loaders import TrainLoader, eval_loader, report_left_out
from minigpt4.quantization.fp8 import check_fp8_supported
from minigpt4.runners.prefetch import prefetch
from minigpt4.runners.schedule import EtaLogger, TrainingSchedule
from minigpt4.runners.state import check_entries, numbers_in, restore_rng_states, rng_states, to_device
from minigpt4.weights import checkpoint, fingerprint


@registry.register_runner("runner_base")
class RunnerBase:
    """Trains `model` on `datasets`, one process a GPU.

    It reads the section `run:`, `model.allow_llm_mismatch` and `datasets.<name>.sample_ratio`, and writes all settings
    into log.txt and checkpoints. `common.contracts` describes the calls of task, model, datasets and schedule.

    A micro-batch is here one of the `accum_grad_iters` batches of an optimizer step, not a part of a packed batch.

    Args:
        cfg: the run's `Config`.
        task: computes the loss of a batch.
        model: is moved to the rank's device if it is not there.
        datasets: {dataset name: {split: dataset}}.
        job_id: name of the run's folder in `run.output_dir`; the same on every rank.

    Raises:
        ConfigError: a split that no dataset has, a dataset smaller than a batch, a stream without `iters_per_epoch`,
            `evaluate` without `test_splits`, fp8 that cannot run, a checkpoint that cannot be resumed.
        ValueError: nothing to train.
        FileExistsError: the folder exists; a run is never overwritten.
    """

    def __init__(self, cfg: Config, task: Task, model: nn.Module, datasets: dict[str, dict], job_id: str):
        self.cfg, self.run, self.task, self.datasets = cfg, cfg.run_cfg, task, datasets
        self.device = dist_utils.select_device(self.run.device)
        if any(parameter.device != self.device for parameter in islice(model.parameters(), 1)):
            model = model.to(self.device)
        self.fingerprint = getattr(model, "fingerprint", None)  # of its language model
        self.module = self.model = model  # with several ranks, `self.model` becomes DDP around `self.module`
        self.dtype = dist_utils.select_dtype(self.device, self.run.amp, self.run.amp_dtype)
        self.world_size = dist_utils.get_world_size()
        self.output_dir = Path(self.run.output_dir) / job_id
        self.start_epoch, self.best_metric = 0, float("-inf")
        self.last_checkpoint: Path | None = None
        self.labels_of_step: list[torch.Tensor] = []  # number of labels of each micro-batch, over all ranks
        if self.run.evaluate and not self.run.test_splits:
            raise ConfigError("run.evaluate=True needs run.test_splits, the splits to evaluate. For example: [test]")
        for split in (*self.run.valid_splits, *self.run.test_splits):
            self._check_evaluated(split)
        if not self.run.evaluate:
            self._prepare_training()
        elif self.run.resume_ckpt_path:
            self._load(checkpoint.resolve(self.run.resume_ckpt_path))
        if dist_utils.is_main_process():
            if self.output_dir.exists():
                raise FileExistsError(f"{self.output_dir} exists: another run began in the same second. Start again.")
            self.output_dir.mkdir(parents=True)
            self._append_log(cfg.to_dict(), indent=4)

    def _prepare_training(self) -> None:
        """Build what a step needs, resume a checkpoint if there is one, then make the model fast and distributed."""
        run = self.run
        datasets, ratios = self._train_datasets()
        self.loader = TrainLoader(
            datasets,
            ratios,
            run.batch_size_train,
            run.num_workers,
            run.seed,
            rank=dist_utils.get_rank(),
            world_size=self.world_size,
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
        schedule = TrainingSchedule(
            run.batch_size_train,
            self.world_size,
            self.iters_per_epoch,
            epochs=max(run.max_epoch - self.start_epoch, 0),  # those that are left
            accum=run.accum_grad_iters,
            on_gpu=self.device.type != "cpu",
        )
        self.eta = EtaLogger(schedule, run.log_freq)
        if run.fp8:
            check_fp8_supported(self.module, self.device, self.dtype)
        if self.dtype != torch.float32 and hasattr(self.module, "accelerate"):
            self.module.accelerate(run.packed, run.compile, run.fp8)
        if self.world_size > 1:
            self.model = self._distributed()

    def train(self) -> None:
        """Train the remaining epochs (none with `run.evaluate`), a checkpoint after each; evaluate the test splits."""
        start = time.time()
        if not self.run.evaluate:
            self._log_plan()
            for epoch in range(self.start_epoch, self.run.max_epoch):
                logging.info("Start training epoch %d, %d iters per inner epoch.", epoch, self.iters_per_epoch)
                self._log_stats("train", self.train_epoch(epoch))
                is_best = self._validate()
                self.save_checkpoint(epoch, is_best)
        for split in self.run.test_splits:
            self._log_stats(split, {"loss": self.evaluate(split)})
        logging.info("Training time %s", datetime.timedelta(seconds=int(time.time() - start)))

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train on `iters_per_epoch` micro-batches; returns the epoch's mean learning rate and loss."""
        self.model.train()
        metrics = MetricLogger()
        header = f"Train: data epoch: [{epoch}]"
        epoch_batches = self.loader.epoch(epoch, self.iters_per_epoch)
        with contextlib.closing(prefetch(epoch_batches, self.module, self.device)) as batches:
            for i, samples in enumerate(metrics.log_every(batches, self.iters_per_epoch, self.run.log_freq, header)):
                self.lr_sched.step(cur_epoch=epoch, cur_step=i)
                is_update = (i + 1) % self.run.accum_grad_iters == 0 or i + 1 == self.iters_per_epoch
                loss = self.train_step(samples, is_update)
                metrics.update(lr=self.optimizer.param_groups[0]["lr"], loss=loss)
                self.eta.step(i)
        for line in report_left_out(sum(dist_utils.gather_objects(self.loader.take_left_out()), Counter())):
            logging.info("Epoch %d: %s", epoch, line)
        return metrics.global_avg()

    def train_step(self, samples: dict, is_update: bool) -> torch.Tensor:
        """Forward and backward pass of a micro-batch on the device, and the update if it is the step's last one.

        Returns this rank's loss.
        """
        # Ranks exchange gradients at the last micro-batch only.
        with contextlib.nullcontext() if is_update or self.world_size == 1 else self.model.no_sync():
            with self._autocast():
                output = self.task.train_step(self.model, samples)
            loss, num_labels = _loss_and_labels(output)
            # torch.full runs on the GPU; copying a tensor from the host would make the host wait.
            labels = torch.full((), float(num_labels), device=self.device)
            if self.world_size > 1:
                labels = dist_utils.all_reduce_sum(labels)
            self.labels_of_step.append(torch.where(labels > 0, labels, 1.0))
            # The gradient must be that of the mean over the labels of all ranks and micro-batches. DDP divides by the
            # number of ranks. So far only the labels of the first micro-batch count; `optimizer_step` corrects that.
            weight = num_labels * self.world_size / self.labels_of_step[0]
            self.scaler.scale(loss * weight).backward()
        if is_update:
            self.optimizer_step()
        return loss.detach()

    def optimizer_step(self) -> None:
        """Rescale the gradients to the mean over all labels of the step, and update the weights."""
        self.scaler.unscale_(self.optimizer)
        if len(self.labels_of_step) > 1:
            share = self.labels_of_step[0] / sum(self.labels_of_step)
            for parameter in self._trainable().values():
                if parameter.grad is not None:
                    parameter.grad.mul_(share)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.labels_of_step.clear()

    @torch.no_grad()
    def evaluate(self, split: str) -> float:
        """The mean loss over all labels of a split. Each sample counts once, for any number of ranks.

        NaN if nothing has a label.
        """
        run, rank = self.run, dist_utils.get_rank()
        self.module.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for dataset in self._split(split).values():
            for samples in eval_loader(dataset, run.batch_size_eval, run.num_workers, rank, self.world_size):
                with self._autocast():
                    output = self.task.valid_step(self.module, to_device(samples, self.device))
                loss, num_labels = _loss_and_labels(output)
                total += torch.tensor([float(loss) * num_labels, num_labels], dtype=torch.float64)
        loss, num_labels = dist_utils.all_reduce_sum(total).tolist()
        return loss / num_labels if num_labels else math.nan

    def save_checkpoint(self, epoch: int, is_best: bool = False) -> None:
        """Write checkpoint_<epoch>.pth, and a copy as checkpoint_best.pth if it is the best so far.

        Raises FloatingPointError for weights that are not finite.
        """
        weights = {name: parameter.detach() for name, parameter in self._trainable().items()}
        broken = [name for name, weight in weights.items() if not weight.isfinite().all()]
        if broken:
            raise FloatingPointError(f"Not saved after epoch {epoch}: not all of {', '.join(broken)} is finite.")
        states = rng_states()
        if not dist_utils.is_main_process():
            return
        # bf16 needs no scaler, but the first release resumes an `amp` run only if it finds the state of one.
        scaler = self.scaler if self.scaler.is_enabled() else torch.amp.GradScaler("cpu")
        content = {
            "model": weights,
            "optimizer": self.optimizer.state_dict(),
            "config": self.cfg.to_dict(),
            "scaler": scaler.state_dict() if self.run.amp else None,
            "epoch": epoch,
            "rng": states,
            "best_metric": self.best_metric,
        }
        if self.fingerprint:
            content[fingerprint.KEY] = self.fingerprint
        for name in [f"checkpoint_{epoch}.pth", *(["checkpoint_best.pth"] if is_best else [])]:
            logging.info("Saving checkpoint at epoch %d to %s.", epoch, self.output_dir / name)
            checkpoint.save(content, self.output_dir / name)
        self.last_checkpoint = self.output_dir / f"checkpoint_{epoch}.pth"

    def _resume(self, path: Path) -> None:
        """Restore weights, optimiser, scaler, random states and best metric, to continue after the checkpoint's epoch.

        Raises CheckpointError for a checkpoint without optimiser state, or with one that does not fit.
        """
        content = self._load(path)
        for name in ("optimizer", "scaler"):
            checkpoint.check_finite(numbers_in(content.get(name), name), str(path))
        try:
            for group in content["optimizer"]["param_groups"]:
                group["fused"] = self.optimizer.defaults["fused"]  # depends on this device, not on the one that saved
            self.optimizer.load_state_dict(content["optimizer"])
            if content.get("scaler") and self.scaler.is_enabled():
                self.scaler.load_state_dict(content["scaler"])
            self.start_epoch = content["epoch"] + 1
        except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise checkpoint.CheckpointError(
                f"{path} holds no optimiser state that fits this run ({error}); it cannot go on from there. To start a "
                f"run from its weights: --options run.resume_ckpt_path=null model.ckpt={path}"
            ) from error
        self.best_metric = content.get("best_metric", self.best_metric)
        restore_rng_states(content.get("rng"))
        logging.info("Resuming after epoch %d from %s.", content["epoch"], path)

    def _load(self, path: Path) -> dict:
        """Load the trained weights of a checkpoint. Returns the whole content of the file."""
        content = checkpoint.read_file(path)
        check_entries(content, str(path))
        weights = checkpoint.weights_of(content, str(path), own=self.module.state_dict().keys())
        allowed = self.cfg.model_cfg.get("allow_llm_mismatch", False)
        fingerprint.check(content.get(fingerprint.KEY), self.fingerprint, str(path), allowed)
        checkpoint.load_weights(self.module, weights, str(path), required=set(self._trainable()))
        return content

    def _validate(self) -> bool:
        """Evaluate the validation splits. Returns True if the metric is the best so far."""
        if not self.run.valid_splits:
            return False
        losses = {split: self.evaluate(split) for split in self.run.valid_splits}
        for split, loss in losses.items():
            self._log_stats(split, {"loss": loss})
        metric = self.task.agg_metrics(sum(losses.values()) / len(losses))
        if math.isnan(metric):
            logging.warning("The metric of %s is not a number; this epoch is not compared.", ", ".join(losses))
        is_best = metric > self.best_metric
        self.best_metric = metric if is_best else self.best_metric
        return is_best

    def _train_datasets(self) -> tuple[dict, dict[str, float]]:
        """The datasets of all training splits and their sample ratios, by name."""
        datasets, ratios = {}, {}
        for split in self.run.train_splits:
            for name, dataset in self._split(split).items():
                key = name if len(self.run.train_splits) == 1 else f"{name}/{split}"
                datasets[key] = dataset
                ratios[key] = self.cfg.datasets_cfg[name].sample_ratio if name in self.cfg.datasets_cfg else 1.0
        return datasets, ratios

    def _split(self, split: str) -> dict:
        """{dataset name: dataset} of the datasets that have the split. Raises ConfigError if none has it."""
        found = {name: splits[split] for name, splits in self.datasets.items() if split in splits}
        if not found:
            known = {name: list(splits) for name, splits in self.datasets.items()}
            raise ConfigError(f"No dataset has the split {split!r}; there are {known}. Change run.*_splits.")
        return found

    def _check_evaluated(self, split: str) -> None:
        """Raise ConfigError if a split cannot be evaluated, at the start rather than after an epoch."""
        for name, dataset in self._split(split).items():
            if isinstance(dataset, IterableDataset):
                raise ConfigError(
                    f"datasets.{name}: a stream of shards has no end, so its split {split!r} cannot be evaluated. "
                    "Change run.valid_splits or run.test_splits."
                )
            if not len(dataset):
                raise ConfigError(f"datasets.{name} has no samples in its split {split!r}, which is to be evaluated.")

    def _distributed(self) -> DistributedDataParallel:
        """The module with gradients exchanged between ranks. All ranks start from rank 0's trainable weights.

        Frozen weights are the same on all ranks already, so 7B of them are not sent.
        """
        for parameter in self._trainable().values():
            torch.distributed.broadcast(parameter.data, src=0)
        with warnings.catch_warnings():
            # torch 2.14 deprecates the name broadcast_buffers; torch 2.11 does not have the new one
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(self.module, init_sync=False, broadcast_buffers=False)

    def _batches_per_pass(self, datasets: dict) -> int:
        """The number of batches in one pass over the data. Raises ConfigError for a stream, which has no end."""
        streams = [name for name, dataset in datasets.items() if isinstance(dataset, IterableDataset)]
        if streams:
            raise ConfigError(
                f"{', '.join(streams)}: a stream of shards has no end, so run.iters_per_epoch must say how long an "
                "epoch is. For example: --options run.iters_per_epoch=500"
            )
        return sum(map(len, datasets.values())) // (self.run.batch_size_train * self.world_size)

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        return checkpoint.trainable_parameters(self.module)

    def _autocast(self):
        # CUDA graphs cannot be captured with a cache of casts. Frozen matrices need no cast anyway.
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)

    def _log_plan(self) -> None:
        if self.start_epoch >= self.run.max_epoch:
            done = pluralize(self.run.max_epoch, "epoch")
            logging.info("Nothing left to train: the checkpoint has done %s. Raise run.max_epoch to go on.", done)
            return
        logging.info("Computing in %s on %s.", str(self.dtype).removeprefix("torch."), self.device)
        self.eta.log_schedule()

    def _log_stats(self, split: str, stats: dict[str, float]) -> None:
        title = "Averaged stats" if split == "train" else split
        logging.info("%s: %s", title, "  ".join(f"{name}: {value:.4f}" for name, value in stats.items()))
        self._append_log({f"{split}_{name}": f"{value:.3f}" for name, value in stats.items()})

    def _append_log(self, entry: dict, indent: int | None = None) -> None:
        if dist_utils.is_main_process():
            with open(self.output_dir / "log.txt", "a", encoding="utf-8") as file:
                file.write(json.dumps(entry, indent=indent) + "\n")


def _loss_and_labels(output: dict | torch.Tensor) -> tuple[torch.Tensor, float]:
    """A step's loss, and the number of labels that it is the mean of (1 if the task returns none)."""
    if isinstance(output, torch.Tensor):
        return output, 1
    return output["loss"], output.get("num_labels", 1)
