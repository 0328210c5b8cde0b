"""Shared fixtures of the data sets' tests."""

import time
from itertools import count
from types import SimpleNamespace

import pytest

from minigpt4.datasets import patience


@pytest.fixture
def later(monkeypatch):
    """Function that has something done in the third pause of a wait, so that a busy machine makes no difference."""

    def do(action):
        pauses = count(1)

        def sleep(seconds):
            time.sleep(seconds)
            if next(pauses) == 3:
                action()

        monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))

    return do
