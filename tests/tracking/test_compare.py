"""python -m minigpt4 compare: where two runs part."""

import json
import re

import pytest
import torch

from minigpt4.__main__ import main
from minigpt4.tracking.metrics import MetricsFile

ABOUT = {
    "started": "today",
    "machine": {"host": "a", "gpus": ["H200"]},
    "packages": {"torch": "2.14"},
    "git": [{"folder": "/a", "commit": "123"}],
}


def edit_numbers(folder, edit):
    lines = list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
    (folder / "metrics.jsonl").unlink()
    file = MetricsFile(folder / "metrics.jsonl")
    for line in filter(edit, lines):
        file.write(line.pop("step"), line)
    file.close()


@pytest.fixture
def runs(make_run, tmp_path):
    """Two runs that are equal, apart from what differs between any two."""
    folders = []
    for name in ("first", "second"):
        folder = make_run(tmp_path / name)
        edit_numbers(folder, lambda line: line.update(samples=f"digest {line['step']}") or True)
        about = ABOUT | {"started": name, "machine": {"host": name, "gpus": ["H200"]}}
        (folder / "environment.json").write_text(json.dumps(about))
        torch.save({"model": {"w": torch.ones(3), "s": torch.tensor(1.0)}, "epoch": 0}, folder / "checkpoint_0.pth")
        folders.append(folder)
    return folders


def test_equal_runs(runs, capsys):
    edit_numbers(runs[1], lambda line: line.update(step_seconds=9.0, host_memory_mib=1) or True)
    assert main(["compare", *map(str, runs)]) == 0
    shown = capsys.readouterr().out
    assert "Settings: equal" in shown and "Environment: equal" in shown and "100 steps in both" in shown
    assert "loss" in shown and "samples" in shown and "checkpoint_0.pth: equal" in shown


def from_step(step, **values):
    return lambda folder: edit_numbers(folder, lambda line: line["step"] < step or line.update(values) or True)


def save(folder):
    torch.save({"model": {"w": torch.zeros(3), "s": torch.tensor(1.0)}, "epoch": 0}, folder / "checkpoint_0.pth")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (from_step(7, loss=9.0), r"step 7, first difference of\n +loss: 0\.428\d+ \| 9\.0"),
        (from_step(3, samples="other"), r"step 3, first difference of\n +samples: digest 3 \| other"),
        (from_step(80, loss=None), r"step 80, first difference of\n +loss: 0\.0375 \| nothing"),
        (lambda folder: edit_numbers(folder, lambda line: line["step"] <= 60), "40 steps in the first run only"),
        (lambda folder: edit_numbers(folder, lambda line: False), "0 steps in both"),
        (save, "checkpoint_0.pth: different weights"),
    ],
)
def test_runs_that_differ(runs, capsys, change, expected):
    change(runs[1])
    if not (runs[1] / "metrics.jsonl").exists():
        (runs[1] / "metrics.jsonl").touch()
    assert main(["compare", *map(str, runs)]) == 1
    assert re.search(expected, capsys.readouterr().out)


def test_settings_and_environment_explain_but_do_not_decide(runs, capsys):
    (runs[1] / "config.yaml").write_text("run: {name: '', seed: 43}\n")
    about = ABOUT | {"packages": {"torch": "2.11"}, "git": [{"folder": "/b", "commit": "456"}]}
    (runs[1] / "environment.json").write_text(json.dumps(about))
    assert main(["compare", *map(str, runs)]) == 0
    shown = capsys.readouterr().out
    assert "Settings: 1 difference" in shown and "run.seed: nothing | 43" in shown
    assert "packages.torch: 2.14 | 2.11" in shown and "commit: 123 | 456" in shown


def test_a_folder_that_is_no_runs(runs, tmp_path):
    assert "is no folder of a run: it has no config.yaml" in main(["compare", str(runs[0]), str(tmp_path)])


@pytest.mark.parametrize("name", ["config.yaml", "environment.json"])
@pytest.mark.parametrize("content", [b"", b"[1]", b"a: [\n\t", b"\xff{"])
def test_a_damaged_file_is_named(runs, name, content):
    (runs[1] / name).write_bytes(content)
    error = main(["compare", *map(str, runs)])
    assert str(runs[1] / name) in error and "damaged" in error
