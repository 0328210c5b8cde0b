"""A sample of a dataset: where it comes from, and whether its numbers can be computed with."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from minigpt4.weights.checkpoint import is_finite


class Sample(dict):
    """A sample that knows its place, the file or shard that it was read from."""

    def __init__(self, fields: Mapping[str, Any], place: str) -> None:
        super().__init__(fields)
        self.place = place


class SampleId(NamedTuple):
    """Names a sample of a batch."""

    dataset: str
    key: str
    """Its `image_id`, or for a dataset that gives none the index."""
    shard: str
    """The file or shard; empty if the dataset does not say."""

    def __str__(self) -> str:
        return f"{self.dataset}: {self.key}" + (f" in {self.shard}" if self.shard else "")


def identify(sample: Any, dataset: str, index: int | None = None) -> SampleId:
    """The name of a sample of any dataset. index: that was asked for; None in a stream."""
    key = sample.get("image_id") if isinstance(sample, Mapping) else None
    key = key if key is not None else "" if index is None else f"[{index}]"
    return SampleId(dataset, str(key), getattr(sample, "place", ""))


def all_finite(value: Any) -> bool:
    """Whether all floating-point numbers in a sample are finite, in nested mappings and lists too."""
    if isinstance(value, torch.Tensor):
        return is_finite(value)
    if isinstance(value, np.ndarray):
        return value.dtype.kind != "f" or bool(np.isfinite(value).all())
    if isinstance(value, Mapping):
        return all(map(all_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(all_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
