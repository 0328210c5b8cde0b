"""What a rank adds up in an epoch."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from minigpt4.common import dist_utils
from minigpt4.common.logger import MetricLogger
from minigpt4.datasets.loaders import LeftOut
from minigpt4.runners import run_log

if TYPE_CHECKING:
    from minigpt4.runners.runner_base import RunnerBase

CUT = LeftOut("texts", "the end of a text longer than model.max_txt_len tokens", "in training", "cut off")
MARKERS = ("captions", "markers of the prompt (###, <ImageHere>, special tokens)")


class EpochProgress:
    """Averages of an epoch, and counts of what was left out of its batches or changed in them."""

    def __init__(self, runner: "RunnerBase") -> None:
        self.metrics, self._loader = MetricLogger(partial(run_log.log_line, runner)), runner.loader
        self._changed: Counter[LeftOut] = Counter()

    def add(self, samples: Mapping[str, Any], **values: float | torch.Tensor) -> None:
        """Count the next batch of the loader, which was trained on. values: as for `MetricLogger.update`."""
        self._loader.use_next()
        self.metrics.update(**values)
        self.metrics.count(**_amounts(samples))
        self._changed.update(LeftOut(*MARKERS, text, "broke up") for text in samples.get("broken_up", ()))
        self._changed[CUT] += samples.get("num_cut", 0)

    def take_counts(self) -> Counter[LeftOut]:
        """Counts of the epoch."""
        return self._loader.take_left_out() + self._changed

    def state(self) -> dict[str, Any]:
        """The state after the batches added. "metrics" is a function that waits for the GPU and returns the sums."""
        changed = [(tuple(key), count) for key, count in self._changed.items()]
        return {"metrics": self.metrics.state(), "loader": self._loader.state(), "changed": changed}

    def load_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the states of all ranks. If there were more or fewer of them, rank 0 takes the sums of all."""
        rank, same = dist_utils.get_rank(), len(states) == dist_utils.get_world_size()
        counted = [states[rank]] if same else states if rank == 0 else []
        for state in counted:
            self.metrics.add_totals(state["metrics"])
            self._changed.update({LeftOut(*key): count for key, count in state["changed"]})
        left_out = [entry for state in counted for entry in state["loader"]["left_out"]]
        self._loader.load_state(left_out, states[rank]["loader"]["restarts"] if rank < len(states) else [])


def _amounts(samples: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of images and of tokens in a batch, as far as they are known without waiting for the device."""
    images, tokens = samples.get("image", samples.get("image_features")), samples.get("tokens")
    found = {"images": len(images)} if hasattr(images, "__len__") else {}
    if hasattr(tokens, "num_tokens"):
        found["tokens"] = tokens.num_tokens
    return found
