"""python -m minigpt4."""

import io
import json
import os
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from minigpt4.__main__ import COMMANDS, main
from minigpt4.common import commands
from minigpt4.common.failing import PATIENCE


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_commands_are_listed(capsys, arguments):
    assert main(arguments) is None
    out = capsys.readouterr().out
    for name, text in COMMANDS.items():
        assert name in out
        assert text in out


def test_unknown_command():
    assert main(["chatt"]) == f"Unknown command 'chatt'. Known: {', '.join(COMMANDS)}."


def test_an_error_of_one_rank_is_printed_after_a_while(monkeypatch, tmp_path):
    """If all ranks fail alike, torchrun ends the others before they print it."""
    (tmp_path / "attempt").mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "attempt" / "0" / "error.json"))
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


TEXTS = ["é 猫 😀 … × \u2028", "of a file name: \udce9"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r", "utf-8", "utf-16"])
def test_screens_of_any_encoding_show_every_text(monkeypatch, encoding):
    """JSON stays valid, and means the same."""
    screens = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    keyboard = io.TextIOWrapper(io.BytesIO(b"What\xff\xe9?\n"), encoding="ascii")
    for name, stream in (screens | {"stdin": keyboard}).items():
        monkeypatch.setattr(sys, name, stream)
    commands.accept_any_text()
    for screen in screens.values():
        print(json.dumps(TEXTS, ensure_ascii=False), file=screen, flush=True)
        assert json.loads(screen.buffer.getvalue().decode(encoding)) == TEXTS
    assert input() == "What\ufffd\ufffd?"


def test_streams_of_notebooks_are_left_as_they_are(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, object())
    commands.accept_any_text()


@pytest.mark.parametrize(
    "command",
    ["-m minigpt4 caption --help", "-m minigpt4 bench data --help", "train.py --help", "demo.py --help"],
)
def test_entry_points_on_an_ascii_screen(command):
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, env=env)
    assert done.returncode == 0 and b"usage: " in done.stdout and not done.stderr


def test_a_prompt_that_the_locale_cannot_read_is_utf_8():
    assert commands.text_argument("Qué 猫") == "Qué 猫"
    assert commands.text_argument("Qué 猫".encode().decode("ascii", "surrogateescape")) == "Qué 猫"
    assert commands.text_argument("\udcff?") == "\ufffd?"
