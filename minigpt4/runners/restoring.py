"""From a checkpoint back into a runner."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minigpt4.common import dist_utils
from minigpt4.common.config import Config
from minigpt4.common.trained_parts import check_parts
from minigpt4.runners import data, resume
from minigpt4.runners.checkpoints import find
from minigpt4.runners.entries import check_entries, check_shapes, numbers_in
from minigpt4.runners.progress import EpochProgress
from minigpt4.runners.state import restore_rng_states
from minigpt4.weights import checkpoint, fingerprint

if TYPE_CHECKING:
    from minigpt4.runners.runner_base import RunnerBase


def chosen_checkpoint(cfg: Config, datasets: Mapping[str, Mapping]) -> str | None:
    """The file that `run.resume_ckpt_path` stands for; None: a new run starts.

    Raises ConfigError for one that a run, unless it only evaluates, cannot go on from.
    """
    run, own = cfg.run_cfg, None
    if not run.evaluate:
        own = resume.facts_of_data(cfg, data.training_data(cfg, datasets)[0], dist_utils.get_world_size())
    path = find(run, lambda content: resume.differences(content, cfg, own)[0] if own else [])
    if path and own:
        content = checkpoint.read_file(path)
        check_entries(content, str(path))
        resume.check(content, cfg, own, str(path))
    return path and str(path)


def load_weights(runner: "RunnerBase", path: Path) -> dict[str, Any]:
    """Load the trained weights of a checkpoint. Returns the whole content of the file."""
    content, module = checkpoint.read_file(path), runner.module
    check_entries(content, str(path))
    weights = checkpoint.weights_of(content, str(path), own=module.state_dict().keys())
    recorded, own = content.get(fingerprint.KEY), getattr(module, "fingerprint", None)
    check_parts(weights, recorded, own or {}, str(path))
    fingerprint.check(recorded, own, str(path), runner.cfg.model_cfg.get("allow_llm_mismatch", False))
    checkpoint.load_weights(module, weights, str(path), required=set(checkpoint.trainable_parameters(module)))
    module.from_checkpoint = {*getattr(module, "from_checkpoint", ()), *weights}
    return content


def restore(runner: "RunnerBase", path: Path) -> None:
    """Restore weights, optimiser, scaler, random states and progress, to continue after the checkpoint.

    Raises CheckpointError for a checkpoint without optimiser state, or with one that does not fit.
    """
    content = load_weights(runner, path)
    differences = resume.check(content, runner.cfg, runner.facts, str(path))
    if dist_utils.is_main_process():
        resume.report(content, *differences)
    _load_states(runner, content, path)
    epoch, batches = content.get("epoch"), content.get("batches") or 0
    if not isinstance(epoch, int) or epoch < 0:
        raise checkpoint.CheckpointError(f"{path} cannot be resumed: its epoch is {epoch!r}, not a number from 0 up.")
    is_within = 0 < batches < runner.iters_per_epoch and bool(content.get("progress"))
    runner.start_epoch = epoch if is_within else epoch + 1
    runner.step = runner.start_epoch * runner.iters_per_epoch + (batches if is_within else 0)
    if readers := (content.get(resume.FACTS) or {}).get(resume.READERS):
        runner.loader.num_readers = runner.facts[resume.READERS] = readers
    if is_within:
        runner.progress = EpochProgress(runner)
        runner.progress.load_states(content["progress"])
    runner.epoch_stats = content.get("epoch_stats") or {}
    runner.run_id = content.get("run_id", runner.run_id)
    runner.validation.resume(content)
    restore_rng_states(content.get("rng"))
    where = f"batch {batches} of epoch {epoch}" if is_within else f"epoch {epoch}"
    logging.info("Resuming after %s from %s.", where, path)


def _load_states(runner: "RunnerBase", content: Mapping[str, Any], path: Path) -> None:
    """Load the states of optimizer, scaler and health."""
    for name in ("optimizer", "scaler"):
        checkpoint.check_finite(numbers_in(content.get(name), name), str(path))
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
    if content.get("grad_norm") is not None:
        runner.health.grad_norm = torch.tensor(content["grad_norm"])


def is_behind(runner: "RunnerBase", line: Mapping[str, Any]) -> bool:
    """Whether a resumed run does not write a line again: that of an earlier step, or epoch if it begins one."""
    step, length = line["step"], runner.iters_per_epoch
    if not runner.validation.validated and step == runner.step and runner.validation.wrote(line):
        return False
    if runner.step % length:
        return step <= runner.step
    return line.get("epoch", (step - 1) // length) < runner.start_epoch
