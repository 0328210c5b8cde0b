"""What a task returns for a batch."""

from collections.abc import Mapping
from typing import Any

import torch

from minigpt4.common.errors import ConfigError


def loss_and_labels(output: Any, source: str, with_gradient: bool = False) -> tuple[torch.Tensor | float, float]:
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
