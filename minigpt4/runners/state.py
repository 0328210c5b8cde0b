"""The state in a checkpoint, random states, and moving a batch to the device: helpers of the training loop."""

import logging
import random
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import NoneType
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from minigpt4.common import dist_utils
from minigpt4.common.errors import ConfigError
from minigpt4.common.eval_mode import evaluating
from minigpt4.common.text import pluralize
from minigpt4.processors import normalise
from minigpt4.weights import fingerprint
from minigpt4.weights.checkpoint import CheckpointError

# Held while a batch is made, and by an evaluation in the middle of an epoch: random states belong to the whole process,
# and data workers must not be forked while a batch is made.
MAKING = threading.Lock()

# Types of the entries of a checkpoint beside its weights.
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


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # it takes no more; a rank adds its number
    torch.manual_seed(seed)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Run a block with the module in eval mode; then restore the modes of all its parts, and this rank's random states.

    No batch is made meanwhile (`prefetch`).
    """
    with MAKING:
        states = RngStates.now()
        try:
            with evaluating(module):
                yield
        finally:
            _restore(states.saved())


class RngStates(NamedTuple):
    """The random states of a process."""

    host: tuple
    """Of python, numpy and torch on the CPU."""
    cuda: torch.Tensor | None
    mps: torch.Tensor | None

    @classmethod
    def now(cls, host: tuple | None = None) -> "RngStates":
        """Those of this moment. host: those of the host, if they are to be of another moment."""
        cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
        return cls(host or host_rng_states(), cuda, mps)

    def saved(self) -> dict:
        """In types that torch reads with `weights_only=True`."""
        python, (version, keys, position, *gauss), cpu = self.host
        numpy = (version, torch.from_numpy(keys.astype(np.int64)), int(position), int(gauss[0]), float(gauss[1]))
        return {"python": python, "numpy": numpy, "torch": cpu, "cuda": self.cuda, "mps": self.mps}


def host_rng_states() -> tuple:
    """The states of python, numpy and torch on the CPU."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def rng_states() -> list[dict]:
    """The random states of every rank, in types that torch reads with `weights_only=True`."""
    return dist_utils.gather_objects(RngStates.now().saved())


def restore_rng_states(states: list[dict] | None) -> None:
    """Restore this rank's state. If states are missing, or of another number of ranks, only a warning is logged."""
    if states is None or len(states) != dist_utils.get_world_size():
        found = "no random states" if states is None else f"the random states of {pluralize(len(states), 'rank')}"
        logging.warning("The checkpoint holds %s: the run goes on with other random numbers.", found)
        return
    try:
        _restore(states[dist_utils.get_rank()])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"The random states of the checkpoint are damaged ({error!r}). Take another one."
        ) from error


def _restore(own: dict) -> None:
    version, internal, gauss = own["python"]
    random.setstate((version, tuple(internal), gauss))
    version, keys, *rest = own["numpy"]
    np.random.set_state((version, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(own["torch"])
    if own["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(own["cuda"])
    if own.get("mps") is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(own["mps"])


def to_device(samples: dict, device: torch.device) -> dict:
    """The batch with its tensors and tokens on `device`. uint8 images are normalised there."""
    if not isinstance(samples, Mapping):
        raise ConfigError(
            f"A batch is a {type(samples).__name__}, and must be a dict. Let the dataset return dicts, or give it a "
            "collater that does."
        )
    non_blocking = device.type == "cuda"  # elsewhere a kernel may read the data before the copy is done
    moved = {}
    for key, value in samples.items():
        moved[key] = value.to(device, non_blocking=non_blocking) if hasattr(value, "to") else value
    return normalise(moved)


def amounts(samples: Mapping) -> dict[str, int]:
    """The numbers of images and of tokens in a batch, as far as they are known without waiting for the device."""
    images, tokens = samples.get("image", samples.get("image_features")), samples.get("tokens")
    found = {"images": len(images)} if hasattr(images, "__len__") else {}
    if hasattr(tokens, "num_tokens"):
        found["tokens"] = tokens.num_tokens
    return found
