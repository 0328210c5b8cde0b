"""Figures with bootstrap intervals, from counts of each example."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
    better: str = "higher"
    """"higher" or "lower": which value is the better one; empty: neither."""

    @property
    def value(self) -> float:
        return float(self.combine(_sums(self.counts)))

    @property
    def each(self) -> np.ndarray:
        """[n]: the figure of each example alone."""
        return self.combine(self.counts)

    def select(self, chosen: np.ndarray) -> "Figure":
        """The figure of the examples at which `chosen` [n] is true."""
        return replace(self, counts=self.counts[chosen])


def intervals(figures: Mapping[str, Figure]) -> dict[str, tuple[float, float]]:
    """{name: (low, high)} of figures over the same examples: the bootstrap intervals.

    LEVEL of RESAMPLES samples of the examples, drawn with replacement, are inside. The order of the examples does not
    matter.
    """
    each = [figure.counts for figure in figures.values()]
    rows, times = np.unique(np.concatenate(each, axis=1), axis=0, return_counts=True)
    n, rng = times.sum(), np.random.default_rng(SEED)
    sums = np.array([rng.multinomial(n, times / n) @ rows for _ in range(RESAMPLES)])
    parts = np.split(sums, np.cumsum([counts.shape[1] for counts in each])[:-1], axis=1)
    found = {}
    for (name, figure), part in zip(figures.items(), parts, strict=True):
        low, high = np.quantile(figure.combine(part), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        found[name] = float(low), float(high)
    return found


def mean(values: Sequence[float], scale: float = 100, flag: bool = False, better: str = "higher") -> Figure:
    """The mean of one value for each example."""
    values = np.asarray(values, dtype=float)
    return Figure(np.stack([values, np.ones_like(values)], axis=1), scale=scale, flag=flag, better=better)


def _sums(counts: np.ndarray) -> np.ndarray:
    """[k]: the sums over the examples, in an order that their values alone decide."""
    rows, times = np.unique(counts, axis=0, return_counts=True)
    return times @ rows
