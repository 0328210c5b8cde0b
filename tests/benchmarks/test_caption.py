"""`bench caption` as a user calls it, with a small model on whatever there is."""

import json

import pytest
import torch

from minigpt4.__main__ import main


def test_captions_are_timed(capsys):
    command = ["bench", "caption", "--size", "small", "--count", "3", "--batch", "1", "2", "--tokens", "1", "4"]
    assert not main([*command, "--workers", "2", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    weights = "16bit" if torch.cuda.is_available() else "32bit"
    assert [(row["weights"], row["batch"]) for row in rows] == [(weights, 1), (weights, 2)]
    assert all(1 <= row["tokens_per_s"] / row["pictures_per_s"] <= 4 for row in rows)
    assert rows[0]["tokens_per_s"] > 0 and all(row["warm_up_s"] >= 0 for row in rows)


@pytest.mark.parametrize("arguments", [["--tokens", "5", "4"], ["--batch", "0"], ["--workers", "0"]])
def test_wrong_numbers(arguments, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "caption", *arguments])
    assert arguments[0] in capsys.readouterr().err
