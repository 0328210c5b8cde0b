"""python -m minigpt4."""

import subprocess
import sys
import time

import pytest
from helpers import ROOT

from minigpt4.__main__ import COMMANDS, main


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_commands_are_listed(capsys, arguments):
    assert main(arguments) is None
    out = capsys.readouterr().out
    for name, text in COMMANDS.items():
        assert name in out
        assert text in out


def test_unknown_command():
    assert main(["chatt"]) == f"Unknown command 'chatt'. Known: {', '.join(COMMANDS)}."


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_torch(command):
    code = (
        f"import sys\nfrom minigpt4.__main__ import main\ntry: main(['{command}', '--help'])\nexcept SystemExit: pass\n"
    )
    code += "sys.exit('torch' in sys.modules)"
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert time.monotonic() - start < 5
