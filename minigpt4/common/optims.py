"""Learning-rate schedules and AdamW's parameter groups."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minigpt4.common import first_release
from minigpt4.common.errors import ConfigError, check_names
from minigpt4.common.registry import registry
from minigpt4.common.schema import LrGroup, RunConfig
from minigpt4.common.trained_parts import part_of, rates_of_parts

__getattr__ = first_release.attributes_of(__name__)  # for names that are gone

# Parameters whose name contains one of these are not decayed, nor are vectors.
NO_DECAY = ("bias", "ln", "bn")


@dataclass
class _Schedule:
    """Sets the learning rate of every parameter group before each step.

    Args:
        optimizer: its parameter groups are changed in place.
        max_epoch, iters_per_epoch: length of the run.
        min_lr, init_lr: lowest and highest learning rate after the warm-up.
        warmup_steps: steps of linear warm-up, counted from 0 in each epoch.
        warmup_start_lr: learning rate at step 0; negative means `init_lr`.
        decay_rate: factor per epoch, for schedules that have one.
    """

    optimizer: torch.optim.Optimizer
    max_epoch: int
    iters_per_epoch: int
    min_lr: float
    init_lr: float
    warmup_steps: int = 0
    warmup_start_lr: float = -1
    decay_rate: float = 1

    def __post_init__(self) -> None:
        if self.warmup_start_lr < 0:
            self.warmup_start_lr = self.init_lr

    def step(self, cur_epoch: int, cur_step: int) -> float:
        """Set and return the learning rate of step `cur_step`, counted from 0 in each epoch, of epoch `cur_epoch`."""
        lr = self.lr(cur_epoch, cur_step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def lr(self, epoch: int, step: int) -> float:
        raise NotImplementedError

    def _warmup(self, step: int) -> float:
        slope = (self.init_lr - self.warmup_start_lr) / max(self.warmup_steps, 1)
        return min(self.init_lr, self.warmup_start_lr + slope * step)


@registry.register_lr_scheduler("linear_warmup_cosine_lr")
class LinearWarmupCosineLR(_Schedule):
    """Linear warm-up, then half a cosine over the whole run, warm-up included."""

    def lr(self, epoch: int, step: int) -> float:
        total_step = epoch * self.iters_per_epoch + step
        if total_step < self.warmup_steps:
            return self._warmup(step)
        angle = math.pi * total_step / (self.max_epoch * self.iters_per_epoch)
        return (self.init_lr - self.min_lr) * 0.5 * (1.0 + math.cos(angle)) + self.min_lr


@registry.register_lr_scheduler("linear_warmup_step_lr")
class LinearWarmupStepLR(_Schedule):
    """Linear warm-up within the first epoch, then `init_lr` times `decay_rate` to the power of the epoch."""

    def lr(self, epoch: int, step: int) -> float:
        if epoch == 0:
            return self._warmup(step)
        return max(self.min_lr, self.init_lr * self.decay_rate**epoch)


class _GroupsOfPart:
    """The parameter groups of one part, in the place of the optimizer that a schedule gets."""

    def __init__(self, optimizer: torch.optim.Optimizer, part: str | None):
        self.optimizer, self.part = optimizer, part

    @property
    def param_groups(self) -> list[dict]:  # the optimizer makes new ones when a state is loaded
        return [group for group in self.optimizer.param_groups if group.get("part") == self.part]


class PartSchedules:
    """A schedule for each part of `run.lr_groups`, and one for all others."""

    def __init__(self, schedules: list):
        self.schedules = schedules

    def step(self, cur_epoch: int, cur_step: int) -> None:
        """Set the learning rates."""
        for schedule in self.schedules:
            schedule.step(cur_epoch=cur_epoch, cur_step=cur_step)


def create_schedule(run_cfg: RunConfig, optimizer: torch.optim.Optimizer, iters_per_epoch: int) -> Any:
    """The schedule of a run: `run.lr_sched`, once for each part with rates of its own."""
    schedule_class = registry.get_lr_scheduler_class(run_cfg.lr_sched)

    def make(groups: Any, rates: RunConfig | LrGroup) -> Any:
        run_and_rates = run_cfg.max_epoch, iters_per_epoch, rates.min_lr, rates.init_lr
        warmup = {"warmup_steps": rates.warmup_steps, "warmup_start_lr": run_cfg.warmup_lr}
        return schedule_class(groups, *run_and_rates, **warmup, decay_rate=run_cfg.lr_decay_rate)

    parts = rates_of_parts(run_cfg)
    if not parts:
        return make(optimizer, run_cfg)
    rates_of = {None: run_cfg, **parts}
    return PartSchedules([make(_GroupsOfPart(optimizer, part), rates) for part, rates in rates_of.items()])


def create_optimizer(
    model: nn.Module, lr: float, weight_decay: float, beta2: float, decay_of_parts: Mapping[str, float] | None = None
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in two groups: decayed and not decayed.

    decay_of_parts: weight decay of the parts that get two groups of their own, in which "part" is the name.

    Raises ConfigError when nothing is trainable, and for a part without a trainable parameter.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ConfigError(f"{type(model).__name__} has no trainable parameter: there is nothing to optimize.")
    decay_of_parts, parts = decay_of_parts or {}, {name: part_of(name) for name, _ in trainable}
    known = sorted(set(parts.values()))
    check_names(decay_of_parts, known, lambda name: f"run.lr_groups.{name}: no parameter of it trains")
    own = {name: part if part in decay_of_parts else None for name, part in parts.items()}
    groups = []
    for part, decay in {None: weight_decay, **decay_of_parts}.items():
        members = [(name, p) for name, p in trainable if own[name] == part]
        decayed = [p for name, p in members if p.ndim >= 2 and not any(each in name for each in NO_DECAY)]
        in_decayed = {id(p) for p in decayed}
        mark = {"part": part} if part else {}
        groups.append({"params": decayed, "weight_decay": decay, **mark})
        groups.append({"params": [p for _, p in members if id(p) not in in_decayed], "weight_decay": 0.0, **mark})
    fused = all(p.is_cuda for _, p in trainable)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, beta2), fused=fused)
