"""When a runner saves its state: after an epoch, within one, and when the run stops; and what a checkpoint holds."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from minigpt4.common import dist_utils
from minigpt4.common.stopping import Stopped
from minigpt4.runners import resume, validation
from minigpt4.runners.checkpoints import Checkpoints
from minigpt4.runners.state import rng_state, rng_states
from minigpt4.weights import checkpoint, fingerprint

if TYPE_CHECKING:
    from minigpt4.runners.runner_base import RunnerBase


class Place(NamedTuple):
    """Where a run is after an update of the weights."""

    epoch: int
    batches: int
    """Micro-batches done in the epoch."""
    step: int
    rng: dict[str, Any]
    progress: dict[str, Any] | None
    """`EpochProgress.state`; None: no micro-batch follows before the next update."""


class Saving:
    """Saves the state of a runner. All methods are called on all ranks; rank 0 writes."""

    def __init__(self, runner: "RunnerBase") -> None:
        run = runner.run
        resumed = Path(run.resume_ckpt_path) if run.resume_ckpt_path and not run.evaluate else None
        self.runner, self.files = runner, Checkpoints(runner.output_dir, run.keep_last, resumed)
        self._host_rng: dict[str, Any] | None = None
        self._place: Place | None = None  # after the last update, if that is not the end of an epoch
        self._saved_step, self._saved_at = 0, time.monotonic()

    def is_due(self) -> bool:
        """Whether the settings ask for a checkpoint within the epoch now, by minutes of the clock of rank 0."""
        steps, minutes = self.runner.run.save_every_steps, self.runner.run.save_every_minutes
        if steps is not None and self.runner.updates % steps == 0:
            return True
        if minutes is None:
            return False
        is_time = dist_utils.is_main_process() and time.monotonic() - self._saved_at >= 60 * minutes
        return dist_utils.agree(int(is_time)) == [1]

    def note_host_rng(self, state: dict[str, Any]) -> None:
        """Note the random states of the host after the next batch was prepared, if that was done ahead of time."""
        self._host_rng = state

    def note_update(self, epoch: int, batches: int) -> None:
        """Note the state after an update, which is saved if the run stops before the next one is complete.

        batches: micro-batches done in the epoch.
        Raises FloatingPointError if too many updates in a row were skipped. Their state is saved before.
        """
        runner = self.runner
        progress = runner.progress.state() if runner.run.accum_grad_iters > 1 else None
        self._place = Place(epoch, batches, runner.step, rng_state(self._host_rng), progress)
        if not runner.health.failure:
            return
        try:
            self.save_within_epoch()
            saved = "The weights, which have not changed since, are in {}."
        except FloatingPointError as error:  # it is the weights that are broken
            saved = f"{error} The last checkpoint is {{}}."
        last = dist_utils.broadcast_object(self.files.last)
        raise FloatingPointError(f"{runner.health.failure} {saved.format(last or 'none')}")

    def end_epoch(self, epoch: int) -> None:
        """Look at the last updates of an epoch, after which `save_epoch` saves."""
        self.runner.health.read()
        self.note_update(epoch, self.runner.iters_per_epoch)
        self._place = None

    @contextmanager
    def saved_if_stopped(self) -> Iterator[None]:
        """A block in which the run may be asked to stop. Then the state after the last update is saved."""
        try:
            yield
        except Stopped:
            if self._place and self._place.step > self._saved_step:
                self.save_within_epoch()
            raise

    def save_epoch(self, epoch: int, is_best: bool = False) -> None:
        """Write checkpoint_<epoch>.pth, and before it a copy as checkpoint_best.pth if it is the best so far."""
        entries = {"epoch": epoch, "rng": rng_states(), "epoch_stats": self.runner.epoch_stats}
        self._save(entries, f"after epoch {epoch}", f"checkpoint_{epoch}.pth", is_best)

    def save_within_epoch(self) -> None:
        """Write checkpoint_<epoch>_<micro-batches>.pth with the state after the last update."""
        place = self._place
        progress = place.progress or self.runner.progress.state()
        progress = {**progress, "metrics": progress["metrics"]()}
        rng, progress = zip(*dist_utils.gather_objects((place.rng, progress)), strict=True)
        entries = {"epoch": place.epoch, "batches": place.batches, "rng": list(rng), "progress": list(progress)}
        self._save(entries, f"at step {place.step}", f"checkpoint_{place.epoch}_{place.batches}.pth")
        self._saved_step = place.step

    def save_best(self) -> None:
        """Write the weights of the middle of an epoch as checkpoint_best.pth. Runs are not resumed from there."""
        content = self._weights(f"at step {self.runner.step}")
        dist_utils.from_main(lambda: self.files.write_best(content, self.runner.step))

    def _save(self, entries: dict[str, Any], when: str, name: str, is_best: bool = False) -> None:
        runner, self._saved_at = self.runner, time.monotonic()
        runner.health.read()
        # bf16 needs no scaler, but the first release resumes an `amp` run only if it finds the state of one.
        scaler = runner.scaler if runner.scaler.is_enabled() else torch.amp.GradScaler("cpu")
        norm = runner.health.grad_norm
        state = {
            "optimizer": runner.optimizer.state_dict(),
            "scaler": scaler.state_dict() if runner.run.amp else None,
            "validated": runner.validation.validated,
            "health": runner.health.state_dict(),
            "grad_norm": None if norm is None else float(norm),
        }
        content = self._weights(when) | state | entries
        dist_utils.from_main(lambda: self.files.write(content, name, is_best))

    def _weights(self, when: str) -> dict[str, Any]:
        """The entries of a checkpoint that describe the weights. Raises FloatingPointError if some are not finite."""
        runner = self.runner
        weights = {name: each.detach() for name, each in checkpoint.saved_parameters(runner.module).items()}
        broken = [name for name, weight in weights.items() if not weight.isfinite().all()]
        if broken:
            raise FloatingPointError(f"Not saved {when}: not all of {', '.join(broken)} is finite.")
        identity = getattr(runner.module, "fingerprint", None)
        return {
            "model": weights,
            "config": runner.cfg.to_dict(),
            "best_metric": runner.best_metric,
            "run_id": runner.run_id,
            resume.FACTS: runner.facts,
            validation.KEY: runner.validation.state(),
        } | ({fingerprint.KEY: identity} if identity else {})
