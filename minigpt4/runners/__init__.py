"""The runners; importing this package registers them."""

from minigpt4.runners.runner_base import RunnerBase

__all__ = ["RunnerBase"]
