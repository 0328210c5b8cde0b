"""Random states, and moving a batch: what the training loop keeps out of sight."""

import logging
import random

import numpy as np
import torch

from minigpt4.common import dist_utils
from minigpt4.common.text import pluralize
from minigpt4.processors import normalise


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def rng_states() -> list[dict]:
    """The random states of every rank, in types that can be read without running pickled code."""
    version, keys, position, *gauss = np.random.get_state()
    own = {
        "python": random.getstate(),
        "numpy": (version, torch.from_numpy(keys.astype(np.int64)), int(position), int(gauss[0]), float(gauss[1])),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }
    return dist_utils.gather_objects(own)


def restore_rng_states(states: list[dict] | None) -> None:
    """Restore this rank's state. A checkpoint without states, or of another number of ranks, is only reported."""
    if states is None or len(states) != dist_utils.get_world_size():
        found = "no random states" if states is None else f"those of {pluralize(len(states), 'rank')}"
        logging.warning("The checkpoint holds %s: the run goes on with other random numbers.", found)
        return
    own = states[dist_utils.get_rank()]
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
    """The batch with what can move (tensors, tokens) on `device`, images that travelled as uint8 normalised there."""
    later = device.type == "cuda"  # elsewhere nothing orders the copy before what reads it
    samples = {
        key: value.to(device, non_blocking=later) if hasattr(value, "to") else value for key, value in samples.items()
    }
    return normalise(samples)
