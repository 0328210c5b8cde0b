"""`bench chat` as a user calls it, with a small model on whatever there is."""

import json

import pytest
import torch

from minigpt4.__main__ import main


def rows(capsys, *arguments):
    assert not main(["bench", "chat", "--size", "small", "--tokens", "4", "--answers", "1", "--json", *arguments])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_way_is_timed(capsys):
    found = rows(capsys, "--batch", "1", "2", "--compare", "--layers", "eager")
    ours = "minigpt4, eager"
    theirs = ["transformers", "transformers, static cache"]
    plain = "16bit" if torch.cuda.is_available() else "32bit"
    expected = [(plain, batch, by) for batch in (1, 2) for by in [ours, *theirs]]
    expected += [("8bit_weights", batch, ours) for batch in (1, 2)]
    assert [(row["weights"], row["batch"], row["by"]) for row in found] == expected
    for row in found:
        assert row["tokens_per_s"] >= row["slowest"] > 0
        assert 0 < row["first_token_ms"] < 1e3 * row["batch"] * 4 / row["slowest"]
        assert row["next_question_ms"] > 0


def test_in_4_bit(capsys):
    pytest.importorskip("bitsandbytes")
    (row,) = rows(capsys, "--batch", "1", "--weights", "4bit")
    assert (row["weights"], row["batch"]) == ("4bit", 1) and row["tokens_per_s"] > 0


def test_nothing_is_compiled_on_a_cpu(capsys):
    (row,) = rows(capsys, "--batch", "1", "--weights", "16bit")
    assert row["by"] == "minigpt4, eager"


def test_unknown_choices_are_refused(capsys):
    with pytest.raises(SystemExit):
        rows(capsys, "--layers", "fast")
    assert "invalid choice: 'fast'" in capsys.readouterr().err
