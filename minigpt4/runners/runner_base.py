"""The training loop: `train` over `train_epoch` over `train_step` over `optimizer_step`."""

import contextlib
import datetime
import logging
import math
import random
import time
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minigpt4.common import dist_utils
from minigpt4.common.config import Config
from minigpt4.common.contracts import Task
from minigpt4.common.optims import create_optimizer, create_schedule
from minigpt4.common.registry import registry
from minigpt4.common.stopping import STOP, Stopped
from minigpt4.common.trained_parts import rates_of_parts
from minigpt4.datasets import workers
from minigpt4.datasets.loaders import TrainLoader, eval_loader
from minigpt4.datasets.seeding import derive_seed
from minigpt4.quantization.fp8 import check_fp8_supported
from minigpt4.runners import data, restoring, resume, run_log, validation
from minigpt4.runners.folder import continue_folder, folder_of, new_run_id, start_folder
from minigpt4.runners.health import Health
from minigpt4.runners.prefetch import prefetch
from minigpt4.runners.progress import EpochProgress
from minigpt4.runners.saving import Saving
from minigpt4.runners.schedule import EtaLogger, TrainingSchedule
from minigpt4.runners.state import to_device
from minigpt4.runners.step_output import loss_and_labels
from minigpt4.runners.validation import Validation
from minigpt4.weights import checkpoint


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
        ConfigError: data that `check_data` refuses, fp8 that cannot run, a checkpoint that cannot be resumed.
        ValueError: nothing to train.
        FileExistsError: the folder holds something; a run is never overwritten.
    """

    def __init__(self, cfg: Config, task: Task, model: nn.Module, datasets: dict[str, dict], job_id: str):
        self.check_data(cfg, datasets)
        self.cfg, self.run, self.task, self.datasets = cfg, cfg.run_cfg, task, datasets
        self.device = dist_utils.select_device(self.run.device)
        if any(parameter.device != self.device for parameter in islice(model.parameters(), 1)):
            model = model.to(self.device)
        self.module = self.model = model  # with several ranks, `self.model` becomes DDP around `self.module`
        self.dtype = dist_utils.select_dtype(self.device, self.run.amp, self.run.amp_dtype)
        self.world_size = dist_utils.get_world_size()
        self.output_dir = folder_of(self.run.output_dir, job_id)
        self.run_id = new_run_id(job_id)
        self.start_epoch, self.best_metric = 0, float("-inf")
        self.step = 0  # micro-batches of each rank since the start of the run
        self.epoch_stats: dict[str, float] = {}  # averages of the epoch that is saved
        self.labels_of_step: list[torch.Tensor] = []  # number of labels of each micro-batch, over all ranks
        self.stop = STOP
        self.saving, self.validation = Saving(self), Validation(self)
        if not self.run.evaluate:
            self._prepare_training()
        elif self.run.resume_ckpt_path:
            restoring.load_weights(self, Path(self.run.resume_ckpt_path))
        dist_utils.from_main(lambda: start_folder(self.output_dir, cfg.to_dict()))
        if self.step:
            earlier, is_behind = Path(self.run.resume_ckpt_path), partial(restoring.is_behind, self)
            dist_utils.from_main(lambda: continue_folder(self.output_dir, earlier, self.best_metric, is_behind))
        self.record = run_log.record_of(self)

    @classmethod
    def check_data(cls, cfg: Config, datasets: dict[str, dict]) -> None:
        """Raise ConfigError for data that the run could not use, and for a checkpoint that it could not go on from.

        train.py calls it before the model is loaded. Afterwards `run.resume_ckpt_path` is the path of a file, or None.
        """
        data.check_data(cfg, datasets, dist_utils.get_world_size())
        validation.check_settings(cfg, datasets)
        for name in cfg.run_cfg.trackers:
            registry.get("tracker", name)
        if cfg.run_cfg.resume_ckpt_path:
            cfg.run_cfg.resume_ckpt_path = restoring.chosen_checkpoint(cfg, datasets)

    def _prepare_training(self) -> None:
        """Build what a step needs, resume a checkpoint if there is one, then make the model fast and distributed."""
        run = self.run
        datasets, ratios = data.training_data(self.cfg, self.datasets)
        self.iters_per_epoch = data.batches_per_epoch(self.cfg, datasets, self.world_size)
        how = run.seed, dist_utils.get_rank(), self.world_size, run.data_timeout_s
        self.loader = TrainLoader(datasets, ratios, run.batch_size_train, run.num_workers, *how)
        decays = {part: rates.weight_decay for part, rates in rates_of_parts(run).items()}
        self.optimizer = create_optimizer(self.module, run.init_lr, run.weight_decay, run.beta2, decays)
        self.lr_sched = create_schedule(run, self.optimizer, self.iters_per_epoch)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.health = Health(self.device, self.scaler, run.max_bad_steps, lambda *line: self.record.append(*line))
        self.facts = resume.facts_of_data(self.cfg, datasets, self.world_size)
        self.facts |= resume.facts_of_model(self.module, self.dtype)
        if run.resume_ckpt_path:
            restoring.restore(self, Path(run.resume_ckpt_path))
        size = run.batch_size_train, self.world_size, self.iters_per_epoch, max(run.max_epoch - self.start_epoch, 0)
        schedule = TrainingSchedule(*size, run.accum_grad_iters, on_gpu=self.device.type != "cpu")
        self.eta = EtaLogger(schedule, run.log_freq)
        if run.fp8:
            check_fp8_supported(self.module, self.device, self.dtype)
        if self.dtype != torch.float32 and hasattr(self.module, "accelerate"):
            self.module.accelerate(run.packed, run.compile, run.fp8)
        if self.world_size > 1:
            self.model = dist_utils.data_parallel(self.module)

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that this run has written, or from which it goes on."""
        return self.saving.files.last

    @property
    def epoch(self) -> int:
        """The epoch of the last micro-batch."""
        return max(self.step - 1, 0) // self.iters_per_epoch

    @property
    def updates(self) -> int:
        """Updates of the weights since the start of the run. An incomplete group at the end of an epoch is one."""
        epochs, batches = divmod(self.step, self.iters_per_epoch)
        accum = self.run.accum_grad_iters
        return epochs * -(-self.iters_per_epoch // accum) + -(-batches // accum)

    def train(self) -> None:
        """Train the remaining epochs (none with `run.evaluate`), a checkpoint after each; evaluate the test splits."""
        start = time.time()
        with contextlib.closing(self.record), workers.name_dead_workers(), self.saving.saved_if_stopped():
            self.stop.begin_steps()
            if not self.run.evaluate:
                run_log.log_plan(self)
                if self.epoch_stats and not self.record.has(self.step, "train_loss"):
                    self.log_stats("train", self.epoch_stats)  # the run that is resumed has saved them, and no more
                self.validation.before_first_step()
                for epoch in range(self.start_epoch, self.run.max_epoch):
                    logging.info("Start training epoch %d, %d iters per inner epoch.", epoch, self.iters_per_epoch)
                    self.epoch_stats = self.train_epoch(epoch)
                    self.step = (epoch + 1) * self.iters_per_epoch
                    self.validation.validated = not self.validation.is_due_after(epoch)
                    self.save_checkpoint(epoch)  # before all that could fail
                    self.log_stats("train", self.epoch_stats)
                    if not self.validation.validated:
                        self.validation.after_epoch(epoch)
            self.validation.of_test_splits()
        logging.info("Training time %s", datetime.timedelta(seconds=int(time.time() - start)))

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train on `iters_per_epoch` micro-batches; returns the epoch's mean learning rate and loss."""
        self.model.train()
        length, accum, log_freq = self.iters_per_epoch, self.run.accum_grad_iters, self.run.log_freq
        first = self.step % length  # more than 0 if a run goes on within the epoch
        self.progress = self.progress if first else EpochProgress(self)
        metrics, header = self.progress.metrics, f"Train: data epoch: [{epoch}]"
        with contextlib.closing(self._batches(epoch, first)) as batches:
            for i, samples in enumerate(metrics.log_every(batches, length, log_freq, header, first), first):
                self.lr_sched.step(cur_epoch=epoch, cur_step=i)
                is_update = (i + 1) % accum == 0 or i + 1 == length
                loss = self.train_step(samples, is_update)
                self.step = epoch * length + i + 1
                self.progress.add(samples, lr=self.optimizer.param_groups[0]["lr"], loss=loss)
                self.eta.step(i - first)
                if is_update and i + 1 < length:
                    self.after_update(epoch, i)
        self.saving.end_epoch(epoch)
        run_log.log_epoch(self, epoch)
        return metrics.global_avg()

    def after_update(self, epoch: int, item: int) -> None:
        """Decide, after each update within an epoch, what follows it: evaluate? save? In this order, on all ranks.

        Whether to stop is decided before the next micro-batch (`_batches`).

        item: the number of the last micro-batch in the epoch, from 0. `updates` counts the updates so far.
        """
        self.saving.note_update(epoch, item + 1)
        start = time.perf_counter()
        if self.validation.is_due():
            self.validation.within_epoch()
        if self.saving.is_due():
            self.saving.save_within_epoch()
        for clock in (self.progress.metrics, self.eta):
            clock.pause(time.perf_counter() - start)

    def _batches(self, epoch: int, first: int) -> Iterator[dict]:
        """The micro-batches of an epoch from number `first` on, on the device.

        Before each, ranks agree on whether to stop: a signal has reached one of them, perhaps while it waits for data.
        Then they raise Stopped together.
        """
        length, waiting = self.iters_per_epoch, self.stop.interruptible
        found = enumerate(self.loader.epoch(epoch, length, first), first)
        source = (self._sanitize(self._with_draw(samples, epoch, number)) for number, samples in found)
        by_thread = self.run.num_workers > 0
        ahead = prefetch(source, self.module, self.device, waiting, self.saving.note_host_rng, by_thread)
        with contextlib.closing(ahead) as batches:
            for _ in range(first, length):
                with contextlib.suppress(Stopped):
                    samples = next(batches)
                self.check_stop()
                yield samples

    def _with_draw(self, samples: dict, epoch: int, number: int) -> dict:
        """Add "prompt_draw" to a batch that the model prepares: a random number from 0 to below 1, by which it draws.

        The number follows from the batch's place in the run. In the thread that prepares batches, random states of the
        process do not serve: whenever torch.compile has compiled, it sets them back to their values from before.
        """
        if not (hasattr(self.module, "prepare") and isinstance(samples, Mapping)):
            return samples  # if it is no dict, `to_device` says so
        own = random.Random(derive_seed("prompt", self.run.seed, dist_utils.get_rank(), epoch, number))
        return {**samples, "prompt_draw": own.random()}

    def _sanitize(self, samples: dict) -> dict:
        return self.module.sanitize(samples) if hasattr(self.module, "sanitize") else samples

    def train_step(self, samples: dict, is_update: bool) -> torch.Tensor:
        """Forward and backward pass of a micro-batch on the device, and the update if it is the step's last one.

        Returns this rank's loss.
        """
        # Ranks exchange gradients at the last micro-batch only.
        with contextlib.nullcontext() if is_update or self.world_size == 1 else self.model.no_sync():
            with self._autocast():
                output = self.task.train_step(self.model, samples)
            loss, num_labels = loss_and_labels(output, f"{type(self.task).__name__}.train_step", with_gradient=True)
            # torch.full runs on the GPU; copying a tensor from the host would make the host wait.
            own = torch.full((2,), float(num_labels), device=self.device)
            own[1].mul_(loss.detach().reshape(()))  # labels, and the sum of their losses
            sums = dist_utils.all_reduce_sum(own) if self.world_size > 1 else own
            self.health.add(sums, own, self.loader.take_ids())
            labels = sums[0]
            self.labels_of_step.append(torch.where(labels > 0, labels, 1.0))
            # The gradient must be that of the mean over the labels of all ranks and micro-batches. DDP divides by the
            # number of ranks. So far only the labels of the first micro-batch count; `optimizer_step` corrects that.
            weight = num_labels * self.world_size / self.labels_of_step[0]
            self.scaler.scale(loss * weight).backward()
        if is_update:
            self.optimizer_step()
        return loss.detach()

    def optimizer_step(self) -> None:
        """Rescale the gradients to the mean over all labels of the step, clip them, and update the weights."""
        self.scaler.unscale_(self.optimizer)
        trained = [p for p in self._trainable().values() if p.grad is not None]
        if len(self.labels_of_step) > 1:
            share = self.labels_of_step[0] / sum(self.labels_of_step)
            for parameter in trained:
                parameter.grad.mul_(share)
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        if self.run.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(trained, self.run.grad_clip, norm)
        self.health.update(self.optimizer, norm, self.step + 1)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.labels_of_step.clear()

    @torch.no_grad()
    def evaluate(self, split: str, most: int | None = None) -> float:
        """The mean loss over all labels of a split. Each sample counts once, for any number of ranks.

        NaN if nothing has a label.

        most: samples of each dataset; given only with `run.eval_samples`.
        """
        run, rank = self.run, dist_utils.get_rank()
        self.module.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for dataset in data.split_of(self.datasets, split).values():
            how = run.batch_size_eval, run.num_workers, rank, self.world_size, most, run.data_timeout_s
            for samples in self.stop.until_stopped(eval_loader(dataset, *how)):
                with self._autocast():
                    output = self.task.valid_step(self.module, to_device(self._sanitize(samples), self.device))
                loss, num_labels = loss_and_labels(output, f"{type(self.task).__name__}.valid_step")
                if num_labels:  # the mean of nothing may be NaN
                    total += torch.tensor([float(loss) * num_labels, num_labels], dtype=torch.float64)
        self.check_stop()
        loss, num_labels = dist_utils.all_reduce_sum(total).tolist()
        return loss / num_labels if num_labels else math.nan

    def check_stop(self) -> None:
        """Raise Stopped on all ranks if one of them was asked to stop. To be called on all ranks."""
        (signal,) = dist_utils.agree(self.stop.number)
        if signal:
            raise Stopped(signal)

    def save_checkpoint(self, epoch: int, is_best: bool = False) -> None:
        """Write checkpoint_<epoch>.pth, and before it a copy as checkpoint_best.pth if it is the best so far.

        Called after each epoch, and again after its validation, if there is one, with the new `best_metric`.
        Raises FloatingPointError for weights that are not finite.
        """
        self.saving.save_epoch(epoch, is_best)

    def _trainable(self) -> dict[str, torch.nn.Parameter]:
        return checkpoint.trainable_parameters(self.module)

    def _autocast(self):
        # CUDA graphs cannot be captured with a cache of casts. Frozen matrices need no cast anyway.
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32, cache_enabled=False)

    def log_stats(self, split: str, stats: dict[str, float], kind: str = "") -> None:
        """Log results of a split. kind: the beginning of their names in metrics.jsonl."""
        title = "Averaged stats" if split == "train" else split
        logging.info("%s: %s", title, "  ".join(f"{name}: {value:.4f}" for name, value in stats.items()))
        if dist_utils.is_main_process():
            self.record.append("log.txt", {f"{split}_{name}": f"{value:.3f}" for name, value in stats.items()})
        self.log({f"{kind}{split}_{name}": value for name, value in stats.items()})

    def log(self, values: Mapping[str, Any], samples: str = "") -> None:
        """Record numbers, texts and pictures of this step by name: in metrics.jsonl, and by the trackers.

        samples: the digest of the samples so far.
        """
        if dist_utils.is_main_process():
            at = {} if self.run.evaluate else {"epoch": self.epoch}
            self.record.log(self.step, at | dict(values), samples)
