"""The entries of a checkpoint beside its weights: whether they are as this project writes them."""

from collections.abc import Iterable, Iterator, Mapping
from types import NoneType

import torch

from minigpt4.weights import fingerprint
from minigpt4.weights.checkpoint import CheckpointError

# Their types.
ENTRIES = {
    "optimizer": dict,
    "config": dict,
    "scaler": (dict, NoneType),
    "epoch": int,
    "rng": (list, NoneType),
    "batches": (int, NoneType),
    "progress": (list, NoneType),
    "best_metric": (int, float),
    "validated": bool,
    "grad_norm": (float, NoneType),
    "epoch_stats": dict,
    "evaluation": dict,
    "run_id": str,
    "health": dict,
    "facts": dict,
    fingerprint.KEY: (dict, NoneType),
}


def check_entries(content: dict, source: str, names: Iterable[str] = tuple(ENTRIES)) -> None:
    """Raise CheckpointError for an entry of a checkpoint of another type than this project writes."""
    for name in content.keys() & set(names):
        value, kinds = content[name], ENTRIES[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            shown = f" {value!r}" if isinstance(value, (str, int, float)) else ""
            raise CheckpointError(f"{source}: its {name!r} is of type {type(value).__name__}{shown}, as in no run's.")
    config = content.get("config") or {}
    datasets = config.get("datasets") or {}
    sections = {name: config.get(name) or {} for name in ("run", "model")} | {"datasets": datasets}
    if isinstance(datasets, Mapping):
        sections |= {f"datasets.{name}": section or {} for name, section in datasets.items()}
    for name, section in sections.items():
        if not isinstance(section, Mapping):
            raise CheckpointError(f"{source}: {name} in its config is {section!r}, and no mapping as in a run's.")


def numbers_in(value: object, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(path, tensor) of all tensors and floats in nested dicts and lists, such as an optimizer's state."""
    if isinstance(value, (torch.Tensor, float)):
        yield name, torch.as_tensor(value)
    elif isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in items:
            yield from numbers_in(part, f"{name}.{key}")


def check_shapes(optimizer: torch.optim.Optimizer) -> None:
    """Raise ValueError for a state of an optimizer that has another shape than its parameter."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, its parameter {tuple(parameter.shape)}")
