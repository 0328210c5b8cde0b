"""python -m minigpt4."""

import subprocess
import sys
import time

import pytest
from helpers import ROOT

from minigpt4.__main__ import COMMANDS, main
from minigpt4.common.errors import PATIENCE


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_commands_are_listed(capsys, arguments):
    assert main(arguments) is None
    out = capsys.readouterr().out
    for name, text in COMMANDS.items():
        assert name in out
        assert text in out


def test_unknown_command():
    assert main(["chatt"]) == f"Unknown command 'chatt'. Known: {', '.join(COMMANDS)}."


def test_an_error_of_one_rank_is_printed_after_a_while(monkeypatch):
    """If all ranks fail alike, torchrun ends the others before they print it."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    mistake = ["bench", "train", "--cfg-path", "missing.yaml"]
    told = main(mistake)
    assert "missing.yaml" in told and not waited
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(mistake) == told and waited == [PATIENCE]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_torch(command):
    code = (
        f"import sys\nfrom minigpt4.__main__ import main\ntry: main(['{command}', '--help'])\nexcept SystemExit: pass\n"
    )
    code += "sys.exit('torch' in sys.modules)"
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("command", ["caption", "cache-features", "make-random-weights", "rehearse"])
def test_an_empty_out_is_an_error(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--out", "", "--cfg-path", "x"])
    assert "argument --out: the path is empty" in capsys.readouterr().err
