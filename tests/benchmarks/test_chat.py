"""`bench chat` as a user calls it, with a small model on whatever there is."""

import json

import pytest
import torch

from minigpt4.__main__ import main


def rows(capsys, *arguments):
    assert not main(["bench", "chat", "--size", "small", "--tokens", "4", "--answers", "1", "--json", *arguments])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_every_way_is_timed(capsys):
    found = rows(capsys, "--batch", "2", "--compare", "--layers", "eager")
    ours = "minigpt4, eager"
    theirs = ["transformers", "transformers, static cache"]
    plain = "16bit" if torch.cuda.is_available() else "32bit"
    expected = [*((plain, 2, by) for by in (ours, *theirs)), ("8bit_weights", 2, ours)]
    assert [(row["weights"], row["batch"], row["by"]) for row in found] == expected
    for row in found:
        assert row["tokens_per_s"] >= row["slowest"] > 0
        assert 0 < row["first_token_ms"] < 1e3 * row["batch"] * 4 / row["slowest"]
        assert row["next_question_ms"] > 0


def test_a_single_answer_in_4_bit(capsys):
    pytest.importorskip("bitsandbytes")
    (row,) = rows(capsys, "--batch", "1", "--weights", "4bit")
    assert (row["weights"], row["batch"]) == ("4bit", 1) and row["tokens_per_s"] > 0
    assert row["by"] == f"minigpt4, {'compiled' if torch.cuda.is_available() else 'eager'}"


def test_unknown_choices_are_refused(capsys):
    with pytest.raises(SystemExit):
        rows(capsys, "--layers", "fast")
    assert "invalid choice: 'fast'" in capsys.readouterr().err
