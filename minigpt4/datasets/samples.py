"""The samples of a dataset: where each comes from, and whether it can be trained on."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from minigpt4.common.errors import UnusableDataError
from minigpt4.datasets.captions import Unusable, usable
from minigpt4.datasets.left_out import Tally
from minigpt4.weights.checkpoint import is_finite

# Samples in a row that cannot be used; more end the run.
MAX_BAD_IN_A_ROW = 1000
NOT_FINITE = "a sample with numbers that are not finite after the processors"


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


def usable_samples(samples: Iterable[Any], tally: Tally) -> Iterator[Any]:
    """Leave out samples with a text that cannot be trained on, or with numbers that are not finite.

    Raises UnusableDataError for MAX_BAD_IN_A_ROW of them.
    """
    bad_in_a_row = 0
    for sample in samples:
        try:
            # A plug-in may have no texts, or others than strings.
            if isinstance(sample, Mapping) and "text_input" in sample:
                text = sample["text_input"]
                usable(text if isinstance(text, str | None) else "another")
            if not all_finite(sample):
                raise Unusable(NOT_FINITE)
        except Unusable as cause:
            tally.drop(str(cause), identify(sample, tally.name).key or "a sample")
            bad_in_a_row += 1
            if bad_in_a_row == MAX_BAD_IN_A_ROW:
                raise UnusableDataError(f"datasets.{tally.name}: {cause}: {bad_in_a_row} samples in a row.") from None
        else:
            bad_in_a_row = 0
            yield sample
