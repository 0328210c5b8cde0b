"""Random states, and moving a batch to the device."""

import logging
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from minigpt4.common import dist_utils
from minigpt4.common.errors import ConfigError
from minigpt4.common.eval_mode import evaluating
from minigpt4.common.text import pluralize
from minigpt4.processors import normalise
from minigpt4.weights.checkpoint import CheckpointError

# Held while a batch is made, and by an evaluation in the middle of an epoch: random states belong to the whole process,
# and data workers must not be forked while a batch is made.
MAKING = threading.Lock()


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
        state = rng_state()
        try:
            with evaluating(module):
                yield
        finally:
            _restore(state)


def host_rng_state() -> dict[str, Any]:
    """The random states of python, numpy and torch on the CPU, in types that torch reads with `weights_only=True`."""
    version, keys, position, *gauss = np.random.get_state()
    numpy = (version, torch.from_numpy(keys.astype(np.int64)), int(position), int(gauss[0]), float(gauss[1]))
    return {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}


def rng_state(host: dict[str, Any] | None = None) -> dict[str, Any]:
    """The random states of this rank, also its GPU's. host: a `host_rng_state` of another moment."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    return {**(host or host_rng_state()), "cuda": cuda, "mps": mps}


def rng_states() -> list[dict[str, Any]]:
    """The random states of every rank."""
    return dist_utils.gather_objects(rng_state())


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
