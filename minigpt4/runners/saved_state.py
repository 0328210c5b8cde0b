"""The state of a runner as the content of a checkpoint, and from there back into a runner."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minigpt4.common import dist_utils
from minigpt4.common.trained_parts import check_parts
from minigpt4.runners import resume, validation
from minigpt4.runners.state import check_entries, check_shapes, numbers_in, restore_rng_states
from minigpt4.weights import checkpoint, fingerprint

if TYPE_CHECKING:
    from minigpt4.runners.runner_base import RunnerBase


def weights_to_save(runner: "RunnerBase", when: str) -> dict[str, Any]:
    """The entries of a checkpoint that describe the weights. Raises FloatingPointError if some are not finite."""
    weights = {name: each.detach() for name, each in checkpoint.saved_parameters(runner.module).items()}
    broken = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if broken:
        raise FloatingPointError(f"Not saved {when}: not all of {', '.join(broken)} is finite.")
    content = {
        "model": weights,
        "config": runner.cfg.to_dict(),
        "best_metric": runner.best_metric,
        "run_id": runner.run_id,
        resume.FACTS: runner.facts,
        validation.KEY: runner.validation.state(),
    }
    return content | ({fingerprint.KEY: runner.fingerprint} if runner.fingerprint else {})


def training_state(runner: "RunnerBase") -> dict[str, Any]:
    """The entries of a checkpoint about optimizer, scaler and validation."""
    # bf16 needs no scaler, but the first release resumes an `amp` run only if it finds the state of one.
    scaler = runner.scaler if runner.scaler.is_enabled() else torch.amp.GradScaler("cpu")
    return {
        "optimizer": runner.optimizer.state_dict(),
        "scaler": scaler.state_dict() if runner.run.amp else None,
        "validated": runner.validated,
        "health": runner.health.state_dict(),
        "grad_norm": None if runner.grad_norm is None else float(runner.grad_norm),
    }


def load_weights(runner: "RunnerBase", path: Path) -> dict:
    """Load the trained weights of a checkpoint. Returns the whole content of the file."""
    content = checkpoint.read_file(path)
    check_entries(content, str(path))
    weights = checkpoint.weights_of(content, str(path), own=runner.module.state_dict().keys())
    allowed = runner.cfg.model_cfg.get("allow_llm_mismatch", False)
    recorded = content.get(fingerprint.KEY)
    check_parts(weights, recorded, runner.fingerprint or {}, str(path))
    fingerprint.check(recorded, runner.fingerprint, str(path), allowed)
    checkpoint.load_weights(
        runner.module, weights, str(path), required=set(checkpoint.trainable_parameters(runner.module))
    )
    runner.module.from_checkpoint = {*getattr(runner.module, "from_checkpoint", ()), *weights}
    return content


def resume_run(runner: "RunnerBase", path: Path) -> None:
    """Restore weights, optimiser, scaler, random states and best metric, to continue after the checkpoint's epoch.

    Raises CheckpointError for a checkpoint without optimiser state, or with one that does not fit.
    """
    content = load_weights(runner, path)
    for name in ("optimizer", "scaler"):
        checkpoint.check_finite(numbers_in(content.get(name), name), str(path))
    differences = resume.check(content, runner.cfg, runner.facts, str(path))
    if dist_utils.is_main_process():
        resume.report(content, *differences)
    try:
        for group in content["optimizer"]["param_groups"]:
            group["fused"] = runner.optimizer.defaults["fused"]  # depends on this device, not on the one that saved
        runner.optimizer.load_state_dict(content["optimizer"])
        check_shapes(runner.optimizer)
        if "health" in content:  # not of an earlier version
            runner.health.load_state_dict(content["health"])
        if content.get("scaler") and runner.scaler.is_enabled():
            runner.scaler.load_state_dict(content["scaler"])
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise checkpoint.CheckpointError(
            f"{path} holds no optimiser state that fits this run ({error}); it cannot go on from there. To start a "
            f"run from its weights: --options run.resume_ckpt_path=null model.ckpt={path}"
        ) from error
    epoch = content.get("epoch")
    if not isinstance(epoch, int) or epoch < 0:
        raise checkpoint.CheckpointError(f"{path} cannot be resumed: its epoch is {epoch!r}, not a number from 0 up.")
    batches = content.get("batches") or 0
    if 0 < batches < runner.iters_per_epoch and content.get("progress"):
        runner.start_epoch, runner.start_batches, runner.to_resume = epoch, batches, content["progress"]
    else:
        runner.start_epoch = epoch + 1
    runner.step = runner.start_epoch * runner.iters_per_epoch + runner.start_batches
    runner.epoch_stats = content.get("epoch_stats") or {}
    if content.get("grad_norm") is not None:
        runner.grad_norm = torch.tensor(content["grad_norm"])
    if readers := (content.get(resume.FACTS) or {}).get(resume.READERS):
        runner.loader.num_readers = runner.facts[resume.READERS] = readers
    runner.run_id = content.get("run_id", runner.run_id)
    runner.validation.resume(content)
    restore_rng_states(content.get("rng"))
    where = f"batch {batches} of epoch {epoch}" if runner.start_batches else f"epoch {epoch}"
    logging.info("Resuming after %s from %s.", where, path)
