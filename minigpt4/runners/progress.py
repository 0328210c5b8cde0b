"""What a rank has added up in an epoch, and its state after an update, from which a run goes on."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from minigpt4.common.logger import MetricLogger
from minigpt4.datasets.loaders import LeftOut, TrainLoader
from minigpt4.runners.state import RngStates, amounts

CUT = LeftOut("texts", "the end of a text longer than model.max_txt_len tokens", "in training", "cut off")
MARKERS = ("captions", "markers of the prompt (###, <ImageHere>, special tokens)")


class EpochProgress:
    """Averages of an epoch, and counts of what was left out of its batches or changed in them."""

    def __init__(self, metrics: MetricLogger, loader: TrainLoader) -> None:
        self.metrics, self.loader = metrics, loader
        self._changed: Counter[LeftOut] = Counter()

    def add(self, samples: Mapping[str, Any], **values: float | torch.Tensor) -> None:
        """Count the next batch of the loader, which was trained on. values: as for `MetricLogger.update`."""
        self.loader.use_next()
        self.metrics.update(**values)
        self.metrics.count(**amounts(samples))
        self._changed.update(LeftOut(*MARKERS, text, "broke up") for text in samples.get("broken_up", ()))
        self._changed[CUT] += samples.get("num_cut", 0)

    def take_counts(self) -> Counter[LeftOut]:
        """Counts of the epoch."""
        return self.loader.take_left_out() + self._changed

    def state(self) -> dict[str, Any]:
        """The state after the batches added, for `on_cpu`. It waits for no GPU."""
        changed = [(tuple(key), count) for key, count in self._changed.items()]
        return {"metrics": self.metrics.state(), "loader": self.loader.state(), "changed": changed}

    def load_states(self, states: Sequence[dict[str, Any]], rank: int, world_size: int) -> None:
        """Go on from the states of all ranks. If there were more or fewer of them, rank 0 takes the sums of all."""
        same = len(states) == world_size
        counted = [states[rank]] if same else states if rank == 0 else []
        totals: dict[str, tuple[float, int]] = {}
        for state in counted:
            for name, (total, number) in state["metrics"].items():
                before = totals.get(name, (0.0, 0))
                totals[name] = before[0] + total, before[1] + number
            self._changed.update({LeftOut(*key): count for key, count in state["changed"]})
        self.metrics.load_state(totals)
        left_out = [entry for state in counted for entry in state["loader"]["left_out"]]
        self.loader.load_state(left_out, states[rank]["loader"]["restarts"] if rank < len(states) else [])


class Place(NamedTuple):
    """Where a run is after an update of the weights."""

    epoch: int
    batches: int
    """Micro-batches done in the epoch."""
    step: int
    rng: RngStates
    progress: dict[str, Any] | None
    """`EpochProgress.state`; None: no micro-batch follows before the next update."""


def on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    """A state of `EpochProgress` as it is saved: in types that torch reads with `weights_only=True`."""
    return {**state, "metrics": state["metrics"]()}
