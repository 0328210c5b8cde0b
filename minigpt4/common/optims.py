"""Learning-rate schedules and AdamW's parameter groups."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from minigpt4.common import first_release
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry

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


def create_optimizer(model: nn.Module, lr: float, weight_decay: float, beta2: float) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in two groups: decayed and not decayed.

    Raises ConfigError when nothing is trainable.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ConfigError(f"{type(model).__name__} has no trainable parameter: there is nothing to optimize.")
    decayed = [p for name, p in trainable if p.ndim >= 2 and not any(part in name for part in NO_DECAY)]
    in_decayed = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": [p for _, p in trainable if id(p) not in in_decayed], "weight_decay": 0.0},
    ]
    fused = all(p.is_cuda for _, p in trainable)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, beta2), fused=fused)
