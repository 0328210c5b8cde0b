"""The same run twice, in two processes, on the CPU: equal to the last bit."""

import pytest
from train_twice import train_twice, write_data

from minigpt4.__main__ import main


@pytest.mark.slow
def test_the_same_run_twice(tmp_path, capsys):
    """Streams and a dataset with a length, two workers each, and other hashes of strings."""
    settings = ["run.device=cpu", "run.max_epoch=2", "run.iters_per_epoch=3", "run.batch_size_train=4"]
    runs = train_twice(tmp_path, [*write_data(tmp_path), *settings])
    assert main(["compare", *map(str, runs)]) == 0, capsys.readouterr().out
    shown = capsys.readouterr().out
    assert "6 steps in both" in shown and "samples" in shown and "checkpoint_1.pth: equal" in shown
