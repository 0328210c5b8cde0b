"""The tests do the same on every machine, whatever variables are set there (`conftest.py`)."""

import ast
import os
import re
import runpy
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

# Variables of the docs under which every test passes, since nothing that they change is tested.
HARMLESS = {
    "CUDA_VISIBLE_DEVICES", "NCCL_NVLS_ENABLE", "NO_ALBUMENTATIONS_UPDATE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY",
    "NCCL_DEBUG", "PIP_INDEX_URL",
    "GGUF",  # of a script in the docs
    "IMG2DATASET",  # the rehearsal's program
    "PYTHONPATH", "PYTORCH_ENABLE_MPS_FALLBACK",
    "PYTHON", "TORCH_INDEX", "VENV",  # of make
}  # fmt: skip


def documented() -> set[str]:
    """Variables that a page or a script shows as `NAME=value`."""
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("dataset/*.md"), *ROOT.glob("dataset/*.sh")]
    found = (re.findall(r"(?<![\w{$.-])[A-Z][A-Z0-9_]{3,}(?==)", text.read_text(encoding="utf-8")) for text in texts)
    return set().union(*found)


def test_no_documented_variable_reaches_a_test(monkeypatch):
    names = documented() - HARMLESS
    assert {"HF_HUB_OFFLINE", "MINIGPT4_API_KEY", "URL_LIST"} <= names
    names |= {"WORLD_SIZE", "RANK", "LOCAL_RANK", "GRADIO_SERVER_PORT", "http_proxy", "ALL_PROXY", "HF_TOKEN"}
    for name in names:
        monkeypatch.setenv(name, "1")
    runpy.run_path(str(ROOT / "tests" / "conftest.py"))
    assert sorted(names & set(os.environ)) == []


def test_no_gpu_is_seen_here():
    assert not torch.cuda.is_available()
    code = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "''\n"


@pytest.mark.parametrize("script", ["train.py", "demo.py", "minigpt4/__main__.py", "minigpt4/__init__.py"])
def test_an_older_python_can_read_the_scripts(script):
    """Up to the message of `common/python_version.py`; the files that they import after it need not be read."""
    for path in (script, "minigpt4/common/__init__.py", "minigpt4/common/python_version.py"):
        ast.parse((ROOT / path).read_text(encoding="utf-8"), feature_version=(3, 10))


def test_an_older_python_is_told_what_is_needed():
    code = "import sys; sys.version_info = (3, 10, 13); sys.argv = ['train.py', '--cfg-path', 'x']; import train"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("Error: MiniGPT-4 needs Python 3.11 or newer; ") and "is 3.10." in done.stderr
    assert "pip install" in done.stderr and "Traceback" not in done.stderr
