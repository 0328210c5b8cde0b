"""The training loop: `train` over `train_epoch` over `train_step` over `optimizer_step`."""

import contextlib
import datetime
import json
import logging
import math
import time
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from minigpt4.common import dist_utils
from minigpt4.common.config import Config
from minigpt4.common.contracts import Task
from minigpt4.common.errors import ConfigError
from minigpt4.common.logger import MetricLogger
from minigpt4.common.optims import create_optimizer, create_schedule
from minigpt4.common.registry import registry
from minigpt4.common.stopping import STOP, Stopped
from minigpt4.common.text import pluralize
from minigpt4.common.trained_parts import rates_of_parts
from minigpt4.datasets import workers
from minigpt4.datasets.loaders import TrainLoader, eval_loader, left_out_counts, report_left_out
from minigpt4.quantization.fp8 import check_fp8_supported
from minigpt4.runners import data, resume, validation
from minigpt4.runners.checkpoints import Checkpoints, find
from minigpt4.runners.folder import continue_folder, folder_of, new_run_id
from minigpt4.runners.health import Health
from minigpt4.runners.prefetch import prefetch
from minigpt4.runners.progress import EpochProgress, Place, on_cpu
from minigpt4.runners.saved_state import load_weights, resume_run, training_state, weights_to_save
from minigpt4.runners.schedule import EtaLogger, TrainingSchedule, log_rates
from minigpt4.runners.state import (
    RngStates,
    check_entries,
    rng_states,
    to_device,
)
from minigpt4.runners.validation import Validation
from minigpt4.tracking.record import RunRecord
from minigpt4.tracking.run_files import without_passwords
from minigpt4.tracking.trackers import RunInfo
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
        self.fingerprint = getattr(model, "fingerprint", None)  # of its language model
        self.module = self.model = model  # with several ranks, `self.model` becomes DDP around `self.module`
        self.dtype = dist_utils.select_dtype(self.device, self.run.amp, self.run.amp_dtype)
        self.world_size = dist_utils.get_world_size()
        self.output_dir = folder_of(self.run.output_dir, job_id)
        self.start_epoch, self.best_metric = 0, float("-inf")
        self.start_batches = 0  # micro-batches that are done in the first epoch here
        self.validated = True  # whether the epoch of the last checkpoint was compared with the best
        self.step = 0  # micro-batches of each rank since the start of the run
        self.checkpoints = Checkpoints(self.output_dir, self.run)
        self.stop = STOP
        self.place: Place | None = None  # after the last update, if that is not the end of an epoch
        self.saved_step = 0  # of the last checkpoint within an epoch
        self.is_time_to_save = False
        self.epoch_stats: dict[str, float] = {}  # averages of the epoch that is saved
        self._host_state: tuple | None = None  # random states after the present batch was prepared by a thread
        self.to_resume: list[dict[str, Any]] = []  # progress of all ranks in the epoch that is resumed
        self.run_id = new_run_id(job_id)
        self.labels_of_step: list[torch.Tensor] = []  # number of labels of each micro-batch, over all ranks
        self.grad_norm: torch.Tensor | None = None  # of the last update, before it was clipped
        self.validation = Validation(self)
        if not self.run.evaluate:
            self._prepare_training()
        elif self.run.resume_ckpt_path:
            load_weights(self, Path(self.run.resume_ckpt_path))
        if dist_utils.is_main_process():
            self.output_dir.mkdir(parents=True, exist_ok=True)
            if any(self.output_dir.iterdir()):
                raise FileExistsError(f"{self.output_dir} holds another run. Start again, with another job id.")
            (self.output_dir / "result").mkdir()  # as in the first release, for what evaluations write
            with open(self.output_dir / "log.txt", "x", encoding="utf-8") as file:
                file.write(json.dumps(cfg.to_dict(), indent=4) + "\n")
            if self.step:
                earlier = Path(self.run.resume_ckpt_path)
                continue_folder(self.output_dir, earlier, self.best_metric, self._is_behind)
        config = json.loads(without_passwords(json.dumps(cfg.to_dict())))
        info = RunInfo(self.run_id, self.run.name or self.run_id, str(self.output_dir), config)
        self.record = RunRecord(info, self.run.trackers)

    @classmethod
    def check_data(cls, cfg: Config, datasets: dict[str, dict]) -> None:
        """Raise ConfigError for data that the run could not use, and for a checkpoint that it could not go on from.

        train.py calls it before the model is loaded. Afterwards `run.resume_ckpt_path` is the path of a file, or None.
        """
        run, world_size = cfg.run_cfg, dist_utils.get_world_size()
        data.check_data(cfg, datasets, world_size)
        validation.check_settings(cfg, datasets)
        for name in run.trackers:
            registry.get("tracker", name)
        if run.resume_ckpt_path:
            own = {} if run.evaluate else resume.facts_of_data(cfg, data.training_data(cfg, datasets)[0], world_size)
            path = find(run, lambda content: [] if run.evaluate else resume.differences(content, cfg, own)[0])
            run.resume_ckpt_path = path and str(path)
            if path and not run.evaluate:
                content = checkpoint.read_file(path)
                check_entries(content, str(path))
                resume.check(content, cfg, own, str(path))

    def _prepare_training(self) -> None:
        """Build what a step needs, resume a checkpoint if there is one, then make the model fast and distributed."""
        run = self.run
        datasets, ratios = data.training_data(self.cfg, self.datasets)
        self.loader = TrainLoader(
            datasets,
            ratios,
            run.batch_size_train,
            run.num_workers,
            run.seed,
            rank=dist_utils.get_rank(),
            world_size=self.world_size,
            timeout_s=run.data_timeout_s,
        )
        self.iters_per_epoch = data.batches_per_epoch(self.cfg, datasets, self.world_size)
        self.facts = resume.facts_of_data(self.cfg, datasets, self.world_size)
        self.facts |= resume.facts_of_model(self.module, self.dtype)
        decays = {part: rates.weight_decay for part, rates in rates_of_parts(run).items()}
        self.optimizer = create_optimizer(self.module, run.init_lr, run.weight_decay, run.beta2, decays)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.health = Health(self.device, self.scaler, run.max_bad_steps, lambda *line: self.record.append(*line))
        self.lr_sched = create_schedule(run, self.optimizer, self.iters_per_epoch)
        if run.resume_ckpt_path:
            resume_run(self, Path(run.resume_ckpt_path))
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
        with contextlib.closing(self.record), workers.name_dead_workers(), self._saved_if_stopped():
            self.stop.begin_steps()
            if not self.run.evaluate:
                self._log_plan()
                self._validate_first()
                for epoch in range(self.start_epoch, self.run.max_epoch):
                    logging.info("Start training epoch %d, %d iters per inner epoch.", epoch, self.iters_per_epoch)
                    self.epoch_stats = self.train_epoch(epoch)
                    self.step = (epoch + 1) * self.iters_per_epoch
                    self.validated = not self.validation.is_due_after(epoch)
                    self.save_checkpoint(epoch)  # before all that could fail
                    self.log_stats("train", self.epoch_stats)
                    if not self.validated:
                        self.validation.after_epoch(epoch)
            with self._best_weights():
                for split in self.run.test_splits:
                    self.log_stats(split, {"loss": self.evaluate(split)}, "test/")
                    if self.validation.scorer:
                        figures = self.validation.scorer.write(split, self.output_dir / split)
                        self.log_stats(split, figures, "test/")
        logging.info("Training time %s", datetime.timedelta(seconds=int(time.time() - start)))

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """Train on `iters_per_epoch` micro-batches; returns the epoch's mean learning rate and loss."""
        self.model.train()
        header = f"Train: data epoch: [{epoch}]"
        length, accum, log_freq = self.iters_per_epoch, self.run.accum_grad_iters, self.run.log_freq
        self.metrics = metrics = MetricLogger(on_line=self._log_line)
        self.progress = EpochProgress(metrics, self.loader)
        first = self._resume_epoch() if self.start_batches else 0
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
        self.health.read()
        self._check_health(epoch, length)
        self.place = None
        self._log_data(epoch)
        return metrics.global_avg()

    def _check_health(self, epoch: int, batches: int) -> None:
        """Save the state and raise FloatingPointError, if too many updates in a row were skipped."""
        if not self.health.failure:
            return
        self._remember(epoch, batches)
        try:
            self.save_within_epoch()
            saved = "The weights, which have not changed since, are in {}."
        except FloatingPointError as error:  # it is the weights that are broken
            saved = f"{error} The last checkpoint is {{}}."
        last = dist_utils.broadcast_object(self.last_checkpoint)
        raise FloatingPointError(f"{self.health.failure} {saved.format(last or 'none')}")

    @property
    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that this run has written, or from which it goes on."""
        return self.checkpoints.last

    def after_update(self, epoch: int, item: int) -> None:
        """Decide, after each update within an epoch, what follows it: evaluate? save? In this order, on all ranks.

        Whether to stop is decided before the next micro-batch (`_batches`).

        item: the number of the last micro-batch in the epoch, from 0. `updates` counts the updates so far.
        """
        self._remember(epoch, item + 1)
        self._check_health(epoch, item + 1)
        start = time.perf_counter()
        if self.validation.is_due(self.updates):
            self.validated = False
            self.validation.within_epoch()
            self.validated = True
        if self.checkpoints.is_due(self.updates) or self.is_time_to_save:
            self.save_within_epoch()
        for clock in (self.metrics, self.eta):
            clock.pause(time.perf_counter() - start)

    def _batches(self, epoch: int, first: int) -> Iterator[dict]:
        """The micro-batches of an epoch from number `first` on, on the device.

        Before each, ranks agree on whether to stop: a signal has reached one of them, perhaps while it waits for data.
        Then they raise Stopped together.
        """
        length, states = self.iters_per_epoch, deque()
        source, waiting = map(self._sanitize, self.loader.epoch(epoch, length, first)), self.stop.interruptible
        with contextlib.closing(prefetch(source, self.module, self.device, waiting, states)) as batches:
            for _ in range(first, length):
                with contextlib.suppress(Stopped):
                    samples = next(batches)
                signal, is_time = dist_utils.agree(self.stop.number, int(self.checkpoints.is_time()))
                if signal:
                    raise Stopped(signal)
                self.is_time_to_save = bool(is_time)
                self._host_state = states.popleft() if states else None
                yield samples

    @property
    def updates(self) -> int:
        """Updates of the weights since the start of the run. An incomplete group at the end of an epoch is one."""
        epochs, batches = divmod(self.step, self.iters_per_epoch)
        accum = self.run.accum_grad_iters
        return epochs * -(-self.iters_per_epoch // accum) + -(-batches // accum)

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
            loss, num_labels = _loss_and_labels(output, f"{type(self.task).__name__}.train_step", with_gradient=True)
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
        if len(self.labels_of_step) > 1:
            share = self.labels_of_step[0] / sum(self.labels_of_step)
            for parameter in self._trainable().values():
                if parameter.grad is not None:
                    parameter.grad.mul_(share)
        trained = [p for p in self._trainable().values() if p.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
        if self.run.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(trained, self.run.grad_clip, self.grad_norm)
        self.health.update(self.optimizer, self.grad_norm, self.step + 1)
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
                loss, num_labels = _loss_and_labels(output, f"{type(self.task).__name__}.valid_step")
                if num_labels:  # the mean of nothing may be NaN
                    total += torch.tensor([float(loss) * num_labels, num_labels], dtype=torch.float64)
        self.check_stop()
        loss, num_labels = dist_utils.all_reduce_sum(total).tolist()
        return loss / num_labels if num_labels else math.nan

    def save_checkpoint(self, epoch: int, is_best: bool = False) -> None:
        """Write checkpoint_<epoch>.pth, and before it a copy as checkpoint_best.pth if it is the best so far.

        Called after each epoch, and again after its validation, if there is one, with the new `best_metric`.
        Raises FloatingPointError for weights that are not finite.
        """
        self.health.read()
        content = weights_to_save(self, f"after epoch {epoch}") | {"epoch": epoch, "rng": rng_states()}
        content["epoch_stats"] = self.epoch_stats
        if dist_utils.is_main_process():
            self.checkpoints.write(content | training_state(self), f"checkpoint_{epoch}.pth", is_best)

    def save_within_epoch(self) -> None:
        """Write checkpoint_<epoch>_<micro-batches>.pth with the state after the last update, on all ranks."""
        place = self.place
        self.health.read()
        content = weights_to_save(self, f"at step {place.step}") | {"epoch": place.epoch, "batches": place.batches}
        progress = on_cpu(place.progress or self.progress.state())
        states = dist_utils.gather_objects((place.rng.saved(), progress))
        content["rng"], content["progress"] = map(list, zip(*states, strict=True))
        if dist_utils.is_main_process():
            self.checkpoints.write(content | training_state(self), f"checkpoint_{place.epoch}_{place.batches}.pth")
        self.saved_step = place.step

    def save_best(self) -> None:
        """Write the weights of the middle of an epoch as checkpoint_best.pth. Runs are not resumed from there."""
        content = weights_to_save(self, f"at step {self.step}")
        if dist_utils.is_main_process():
            self.checkpoints.write_best(content, self.step)

    def _resume_epoch(self) -> int:
        """Go on within an epoch. Returns the number of its next micro-batch."""
        rank = dist_utils.get_rank()
        self.progress.load_states(self.to_resume, rank, self.world_size)
        first, self.start_batches, self.to_resume = self.start_batches, 0, []
        return first

    def _validate_first(self) -> None:
        """Validate before the first step: a new run, or what the resumed run has not validated.

        If that was killed after it saved an epoch, the epoch's averages are logged first.
        """
        if self.epoch_stats and dist_utils.is_main_process() and not self.record.has(self.step, "train_loss"):
            self.log_stats("train", self.epoch_stats)
        if self.step == 0:
            self.validation.before_training()
        elif self.start_batches:
            if not self.validated and self.validation.is_due(self.updates):
                logging.info("Step %d is validated first: the run that is resumed has not.", self.updates)
                self.validation.within_epoch()
            self.validated = True
        elif self.run.valid_splits and not self.validated:
            logging.info("Epoch %d is validated first: the run that is resumed has not.", self.start_epoch - 1)
            self.validation.after_epoch(self.start_epoch - 1)

    def _remember(self, epoch: int, batches: int) -> None:
        """Note the state after an update, which is saved if the run stops before the next one is complete."""
        progress = self.progress.state() if self.run.accum_grad_iters > 1 else None
        self.place = Place(epoch, batches, self.step, RngStates.now(self._host_state), progress)

    @contextlib.contextmanager
    def _saved_if_stopped(self) -> Iterator[None]:
        """A block in which the run may be asked to stop. Then the state after the last update is saved."""
        try:
            yield
        except Stopped:
            if self.place and self.place.step > self.saved_step:
                self.save_within_epoch()
            dist_utils.agree(0)  # torchrun ends the others as soon as one ends, and rank 0 may still write
            raise

    def check_stop(self) -> None:
        """Raise Stopped on all ranks if one of them was asked to stop. To be called on all ranks."""
        (signal,) = dist_utils.agree(self.stop.number)
        if signal:
            raise Stopped(signal)

    @contextlib.contextmanager
    def _best_weights(self) -> Iterator[None]:
        """While entered, the model has the weights of the best checkpoint, if the run has one and there is a test."""
        best, last = self.output_dir / "checkpoint_best.pth", {}
        if self.run.test_splits and not self.run.evaluate:
            found = dist_utils.broadcast_object(best.is_file())  # the other ranks may be on other disks
            which = best if found else "the weights of the last epoch, since there is no checkpoint_best.pth"
            logging.info("The test splits are measured with %s.", which)
            if found:
                last = {name: parameter.detach().clone() for name, parameter in self._trainable().items()}
                if dist_utils.is_main_process():
                    load_weights(self, best)
                self._copy_from_rank_0()
        yield
        for name, weight in last.items():
            self._trainable()[name].data.copy_(weight)

    def _distributed(self) -> DistributedDataParallel:
        """The module with gradients exchanged between ranks. All ranks start from rank 0's trainable weights.

        Frozen weights are the same on all ranks already, so 7B of them are not sent.
        """
        self._copy_from_rank_0()
        with warnings.catch_warnings():
            # torch 2.14 deprecates the name broadcast_buffers; torch 2.11 does not have the new one
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(self.module, init_sync=False, broadcast_buffers=False)

    def _copy_from_rank_0(self) -> None:
        """Give the trainable weights of rank 0 to the other ranks."""
        if dist_utils.is_distributed():
            for parameter in self._trainable().values():
                torch.distributed.broadcast(parameter.data, src=0)

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
        log_rates(self.module, self.run)
        if dist_utils.is_main_process():
            data.log_samples(self.cfg, self.datasets, self.module)
        data.log_data(self.cfg, self.datasets)
        logging.info("Start training")
        logging.info("Computing in %s on %s.", str(self.dtype).removeprefix("torch."), self.device)
        self.eta.log_schedule()

    def log_stats(self, split: str, stats: dict[str, float], kind: str = "") -> None:
        """Log results of a split. kind: the beginning of their names in metrics.jsonl."""
        title = "Averaged stats" if split == "train" else split
        logging.info("%s: %s", title, "  ".join(f"{name}: {value:.4f}" for name, value in stats.items()))
        if dist_utils.is_main_process():
            self.record.append("log.txt", {f"{split}_{name}": f"{value:.3f}" for name, value in stats.items()})
        self.log({f"{kind}{split}_{name}": value for name, value in stats.items()})

    def _log_line(self, item: int, values: dict[str, float]) -> None:
        """Record the values of a log line, whose rates are those of this rank."""
        values = {name: n * (self.world_size if "_per_" in name else 1) for name, n in values.items()}
        if self.grad_norm is not None:
            values["grad_norm"] = float(self.grad_norm)
        self.log(values, self.health.digest)

    def _log_data(self, epoch: int) -> None:
        """Report what was left out of an epoch, by all ranks, the shares of the datasets, and skipped updates."""
        left_out = sum(dist_utils.gather_objects(self.progress.take_counts()), Counter())
        for line in report_left_out(left_out):
            logging.info("Epoch %d: %s", epoch, line)
        shares, values = self.loader.shares(), left_out_counts(left_out) | self.health.take_counts(epoch)
        if len(shares) > 1:
            batches = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
            logging.info("Epoch %d: batches from %s.", epoch, batches)
            values |= {f"share/{name}": share for name, share in shares.items()}
        if values:
            self.log(values)

    def log(self, values: Mapping[str, Any], samples: str = "") -> None:
        """Record numbers, texts and pictures of this step by name: in metrics.jsonl, and by the trackers.

        samples: the digest of the samples so far.
        """
        if dist_utils.is_main_process():
            at = {} if self.run.evaluate else {"epoch": max(self.step - 1, 0) // self.iters_per_epoch}
            self.record.log(self.step, at | dict(values), samples)

    def _is_behind(self, line: Mapping[str, Any]) -> bool:
        """Whether the resumed run does not write a line of metrics.jsonl again."""
        epoch, last = line.get("epoch", 0), self.start_epoch - 1
        again = not self.validated and line["step"] == self.step and self.validation.wrote(line)
        is_of_past = line["step"] <= self.step if self.start_batches else epoch <= last
        return is_of_past and not again


def _loss_and_labels(output, source: str, with_gradient: bool = False) -> tuple[torch.Tensor | float, float]:
    """A step's loss, and the number of labels that it is the mean of (1 if the task returns none).

    Raises ConfigError that names `source`, whose result `output` is, if it holds no loss.
    """
    is_dict = isinstance(output, Mapping)
    loss, num_labels = (output.get("loss"), output.get("num_labels", 1)) if is_dict else (output, 1)
    problem = None
    if isinstance(loss, (int, float)) and not with_gradient:
        return loss, num_labels
    if not isinstance(loss, torch.Tensor):
        keys = f" with the keys {', '.join(map(str, output)) or 'none'}" if is_dict else ""
        problem = f"a {type(output).__name__}{keys}"
    elif loss.numel() != 1:
        problem = f"a loss of shape {list(loss.shape)}"
    elif with_gradient and not loss.requires_grad:
        problem = "a loss that depends on no trainable parameter"
    if problem:
        raise ConfigError(
            f"{source} (by default, the model's forward) returned {problem}. It must return the mean loss of the batch "
            'as a tensor with one number, or {"loss": that tensor, "num_labels": …}.'
        )
    return loss, num_labels
