"""Times training steps on several ranks: what `bench train` reports under torchrun.

A step is taken in three ways, by the same runner and with the same code:

- together, as it trains: the ranks exchange their label counts and gradients. `median_s` and all rates are of these.
- without exchange: all ranks at once, each with its own labels and gradients only. In turn with the first way, step by
  step, and on the fixed workloads with the same batches.
- alone: one rank steps, the others wait, one after the other. In a row, after all other steps: a GPU that rests before
  each step would be faster than one that trains.

Steps of the first two ways begin at a barrier, which is not timed, and last until the slowest rank is through. A rank
with a shorter batch waits for the others in both of them, so this is no communication; it does cost efficiency.
"""

import contextlib
import statistics
from collections.abc import Iterator

from minigpt4.benchmarks.step_timer import StepTimer
from minigpt4.common import dist_utils


class ScalingTimer(StepTimer):
    """A StepTimer to be used by all ranks alike."""

    def __init__(self, runner, batches: Iterator[dict]):
        super().__init__(runner, batches)
        self.ranks = dist_utils.get_world_size()
        self.no_exchange, self.alone = (StepTimer(runner, batches) for _ in range(2))

    def step(self) -> None:
        """A step with exchange and one without. They take turns in going first, since a new shape costs the first."""
        ways = (self._step_together, self._step_without_exchange)
        for step in reversed(ways) if len(self.seconds) % 2 else ways:
            dist_utils.barrier()
            step()

    def _step_together(self) -> None:
        super().step()

    def _step_without_exchange(self) -> None:
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

    def row(self, warmup: int) -> dict:
        """As of one rank, for all together: times of the slowest, rates of all, the largest memory, the mean loss,
        rank 0's parts.

        And `no_exchange_s`, the slowest rank's median; `alone_s`, the mean of the ranks' medians; `efficiency`, of N
        ranks against N times one: alone_s / median_s; `communication`, the share of a step that goes when nothing is
        exchanged, the median of pairs. It can be below 0 by noise.
        """
        steps = (self.seconds, self.no_exchange.seconds, self.alone.seconds, self.losses, self.images, self.tokens)
        of_ranks = dist_utils.gather_objects((*steps, self.memory))
        seconds, no_exchange, alone, losses, images, tokens, memory = zip(*of_ranks, strict=True)
        self.seconds, no_exchange = _each_step(max, seconds), _each_step(max, no_exchange)
        self.images, self.tokens = _each_step(sum, images), _each_step(sum, tokens)
        self.losses = _each_step(statistics.mean, losses)
        self.memory = {name: max(of_rank[name] for of_rank in memory) for name in self.memory}
        row = super().row(warmup)
        pairs = zip(self.seconds[warmup:], no_exchange[warmup:], strict=True)
        alone_s = statistics.mean(statistics.median(of_rank[warmup:]) for of_rank in alone)
        return row | {
            "ranks": self.ranks,
            "no_exchange_s": round(statistics.median(no_exchange[warmup:]), 4),
            "alone_s": round(alone_s, 4),
            "efficiency": round(alone_s / statistics.median(self.seconds[warmup:]), 3),
            "communication": round(statistics.median(1 - without / with_ for with_, without in pairs), 3),
        }


def _each_step(function, of_ranks: tuple[list, ...]) -> list:
    """`function` of what the ranks have of a step, for each step."""
    return [function(values) for values in zip(*of_ranks, strict=True)]


@contextlib.contextmanager
def without_exchange(runner) -> Iterator[None]:
    """While it is entered, the runner steps as if it were the only one. DDP leaves gradients alone that it has not seen
    a forward pass of.

    Weights of the ranks drift apart in such steps, which no time depends on.
    """
    model, ranks = runner.model, runner.world_size
    runner.model, runner.world_size = runner.module, 1
    try:
        yield
    finally:
        runner.model, runner.world_size = model, ranks
