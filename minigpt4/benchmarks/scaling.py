"""Times training steps on several ranks, for `bench train` under torchrun.

The same runner takes steps in three ways, with the same code:

- together, as in training: the ranks exchange label counts and gradients. `median_s` and all rates are of these steps.
- without exchange: all ranks step at once, each with its own labels and gradients only. These steps alternate with the
  first kind, and on the fixed workloads they take the same batches.
- alone: one rank steps while the others wait, rank after rank. These steps come last and in a row: a GPU that rests
  before each step would be faster than one that trains.

Steps of the first two kinds begin at a barrier, which is not timed, and last until the slowest rank has finished. In
both, a rank with a shorter batch waits for the others. So this wait counts in `efficiency`, but not in `communication`.
"""

import contextlib
import statistics
from collections.abc import Callable, Iterator

from minigpt4.benchmarks.step_timer import StepTimer
from minigpt4.common import dist_utils


class ScalingTimer(StepTimer):
    """A StepTimer for several ranks, all of which make the same calls."""

    def __init__(self, runner, batches: Iterator[dict]):
        super().__init__(runner, batches)
        self.ranks = dist_utils.get_world_size()
        self.no_exchange, self.alone = StepTimer(runner, batches), StepTimer(runner, batches)

    def step(self) -> None:
        """A step with exchange and one without. They take turns in going first: the first one compiles a new shape."""
        exchange_first = len(self.seconds) % 2 == 0
        for exchange in (exchange_first, not exchange_first):
            dist_utils.barrier()
            if exchange:
                super().step()
            else:
                with without_exchange(self.runner):
                    self.no_exchange.step()

    def step_alone(self, count: int) -> None:
        """`count` steps of each rank while the others wait."""
        for rank in range(self.ranks):
            dist_utils.barrier()
            if rank == dist_utils.get_rank():
                with without_exchange(self.runner):
                    for _ in range(count):
                        self.alone.step()
        dist_utils.barrier()

    def summary(self, warmup: int) -> dict:
        """The results of all ranks together: times of the slowest, rates of all, largest memory, mean loss, rank 0's
        parts. Besides:

        - `no_exchange_s`: the slowest rank's median
        - `alone_s`: the mean of the ranks' medians
        - `efficiency`: alone_s / median_s
        - `communication`: the share of a step that exchanging takes, the median of pairs. Noise can make it negative.
        """
        own = (self.seconds, self.no_exchange.seconds, self.alone.seconds, self.losses, self.images, self.tokens)
        of_ranks = dist_utils.gather_objects((*own, self.memory))
        seconds, no_exchange, alone, losses, images, tokens, memory = zip(*of_ranks, strict=True)
        self.seconds, no_exchange = _each_step(max, seconds), _each_step(max, no_exchange)
        self.images, self.tokens = _each_step(sum, images), _each_step(sum, tokens)
        self.losses = _each_step(statistics.mean, losses)
        self.memory = {name: max(of_rank[name] for of_rank in memory) for name in self.memory}
        summary = super().summary(warmup)
        pairs = zip(self.seconds[warmup:], no_exchange[warmup:], strict=True)
        alone_s = statistics.mean(statistics.median(of_rank[warmup:]) for of_rank in alone)
        return summary | {
            "ranks": self.ranks,
            "no_exchange_s": round(statistics.median(no_exchange[warmup:]), 4),
            "alone_s": round(alone_s, 4),
            "efficiency": round(alone_s / statistics.median(self.seconds[warmup:]), 3),
            "communication": round(statistics.median(1 - without / with_ for with_, without in pairs), 3),
        }


def _each_step(combine: Callable, of_ranks: tuple[list, ...]) -> list:
    """For each step, the ranks' values combined."""
    return [combine(values) for values in zip(*of_ranks, strict=True)]


@contextlib.contextmanager
def without_exchange(runner) -> Iterator[None]:
    """While entered, the runner steps as if it were the only one. DDP, which is passed over, then exchanges nothing.

    The ranks' weights drift apart in such steps. No time depends on this.
    """
    model, ranks = runner.model, runner.world_size
    runner.model, runner.world_size = runner.module, 1
    try:
        yield
    finally:
        runner.model, runner.world_size = model, ranks
