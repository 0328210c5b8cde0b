"""Bounds of settings, for the command line and for YAML files."""

from dataclasses import dataclass

import pytest

from minigpt4.common.settings import broken_bound, check_bounds, setting

NAN, INF = float("nan"), float("inf")


@dataclass
class Some:
    low: float = setting(1.0, at_least=0, at_most="high")
    high: float | None = setting(2.0, less_than=10)
    free: float = setting(0.0)
    name: str = setting("a")

    def __post_init__(self):
        check_bounds(self)


def test_within_bounds():
    Some(low=2, high=2)
    Some(low=100, high=None)
    Some(free=-1e9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"low": -1}, "low=-1 must be at least 0"),
        ({"low": 3}, "low=3 must be at most high=2.0"),
        ({"high": 10}, "high=10 must be less than 10"),
        *(({key: value}, f"{key}=.* must be a finite number") for key in ("low", "free") for value in (NAN, INF)),
    ],
)
def test_out_of_bounds(wrong, message):
    with pytest.raises(ValueError, match=message):
        Some(**wrong)


@pytest.mark.parametrize("bounds", [{}, {"at_least": 0}, {"at_most": 0}, {"more_than": 0}, {"less_than": 0}])
def test_nan_breaks_any_bound(bounds):
    assert broken_bound(NAN, bounds, {}.get)
