"""The tests do the same on every machine, whatever variables are set there (`conftest.py`)."""

import os
import re
import runpy
import subprocess
import sys

import torch
from helpers import ROOT

# Variables of the docs under which every test passes, since nothing that they change is tested.
HARMLESS = {
    "CUDA_VISIBLE_DEVICES", "NCCL_NVLS_ENABLE", "NO_ALBUMENTATIONS_UPDATE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY",
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
