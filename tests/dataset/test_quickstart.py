"""`make quickstart` says how to go on after a failure."""

import sys

import pytest
import quickstart


def test_a_failure_says_how_to_go_on(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--options", "run.seed=43", "model.lora={r: 8}"])
    with pytest.raises(SystemExit) as end:
        quickstart.run(["-c", "raise SystemExit(9)"])
    assert "status 9" in end.value.code
    assert "--options run.seed=43 'model.lora={r: 8}' run.resume_ckpt_path=auto" in end.value.code
