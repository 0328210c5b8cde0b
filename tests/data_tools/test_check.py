"""Every fault that was planted is found at its place, and no other."""

import json
import re

import pytest
from dataset_files import write_align, write_shards
from helpers import ROOT

from data_tools.faulty import LINES, write_faulty_jsonl, write_faulty_shards
from minigpt4.cli.data import main

STAGE2 = str(ROOT / "train_configs/minigpt4_tiny_stage2_finetune.yaml")


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """Runs `data check` and returns its exit status and each dataset of its report."""
    monkeypatch.chdir(ROOT)

    def run(*arguments, workers=1):
        status = main(["check", *map(str, arguments), "--out", str(tmp_path / "report"), "--workers", str(workers)])
        run.text = capsys.readouterr().out
        run.all = json.loads((tmp_path / "report/report.json").read_text())
        return status, *run.all["datasets"]

    return run
