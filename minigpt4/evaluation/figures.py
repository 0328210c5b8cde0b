"""Figures with bootstrap intervals, from counts of each example."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
SEED = 0
LEVEL = 0.95


def ratio(sums: np.ndarray) -> np.ndarray:
    """First sum / second sum, [..., 2] -> [...]; 0 where the second is 0."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.zeros(sums.shape[:-1]), where=sums[..., 1] != 0)


@dataclass(frozen=True)
class Figure:
    """A figure that is a function of sums over the examples."""

    counts: np.ndarray
    """[n,k] float: what each example adds to the sums."""
    combine: Callable[[np.ndarray], np.ndarray] = ratio
    """From sums [..., k] to the figure [...]."""
    scale: float = 100
    """The factor in tables."""
    flag: bool = False
    """Whether the page marks the examples whose value is above 0."""

    @property
    def value(self) -> float:
        return float(self.combine(_sums(self.counts)))

    @property
    def each(self) -> np.ndarray:
        """[n]: the figure of each example alone."""
        return self.combine(self.counts)

    def select(self, chosen: np.ndarray) -> "Figure":
        """The figure of the examples at which `chosen` [n] is true."""
        return Figure(self.counts[chosen], self.combine, self.scale, self.flag)

    def interval(self) -> tuple[float, float]:
        """The bootstrap interval: LEVEL of RESAMPLES samples of n examples, drawn with replacement, are inside.

        It does not depend on the order of the examples.
        """
        rows, times = np.unique(self.counts, axis=0, return_counts=True)
        n, rng = len(self.counts), np.random.default_rng(SEED)
        values = [self.combine(rng.multinomial(n, times / n) @ rows) for _ in range(RESAMPLES)]
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)


def mean(values: Sequence[float], scale: float = 100, flag: bool = False) -> Figure:
    """The mean of one value for each example."""
    values = np.asarray(values, dtype=float)
    return Figure(np.stack([values, np.ones_like(values)], axis=1), scale=scale, flag=flag)


def _sums(counts: np.ndarray) -> np.ndarray:
    """[k]: the sums over the examples, in an order that their values alone decide."""
    rows, times = np.unique(counts, axis=0, return_counts=True)
    return times @ rows
