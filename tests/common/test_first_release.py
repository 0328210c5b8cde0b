"""Modules and names of the first releases say what to use now."""

import importlib
import re
import subprocess
import sys

import pytest
from helpers import ROOT

from minigpt4.common.first_release import PAGE, gone

GONE = gone()
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", GONE)
def test_names_that_are_gone_say_what_to_use(name):
    parent, _, last = name.rpartition(".")
    for statement in (f"from {parent} import {last}", f"import {name}"):
        # A name in a module is no module that could be imported.
        if statement.startswith("import") and not hasattr(importlib.import_module(parent), "__path__"):
            continue
        with pytest.raises(ImportError) as error:
            exec(statement, {})
        assert GONE[name] in str(error.value) and PAGE in str(error.value)


@pytest.mark.parametrize("name", GONE)
def test_what_to_use_exists(name):
    """Every `from … import …` and every file or page in an answer."""
    for module, names in re.findall(r"from (minigpt4[\w.]+) import ([\w, ]+\w)", GONE[name]):
        for each in re.findall(r"\w+", names.split(" which")[0]):
            assert hasattr(importlib.import_module(module), each)
    for path in re.findall(r"[\w/]+\.(?:md|py)\b", GONE[name]):
        assert (ROOT / path).exists()
    if "of the same module" in GONE[name]:
        word = re.match(r"(?:with |if )?(\w+)", GONE[name])[1]
        assert hasattr(importlib.import_module(name.rpartition(".")[0]), word)


def test_only_names_that_are_gone_are_answered():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'minigpt4\.models\.nonsense'"):
        importlib.import_module("minigpt4.models.nonsense")
    from minigpt4.common import dist_utils

    assert not hasattr(dist_utils, "nonsense")
    assert importlib.util.find_spec("minigpt4.models.mini_gpt4")


def test_a_command_line_shows_it():
    code = "from minigpt4.common.gradcam import getAttMap"  # without torch
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: minigpt4.common.gradcam is of an earlier release. Now: "
    )


def test_the_page_names_the_modules():
    later = re.compile(
        r"datasets\.datasets\.|minigpt_|minigpt4\.models\.minigpt4|Builder$|doc_dataset|vqa|caption_tools|eval_utils|_v2|Vicuna0|LLama2"
    )
    for name in GONE:
        last = name.rpartition(".")[2]
        if not later.search(name):
            assert re.search(rf"\b{last}\b", TEXT) or last in (
                "get_dist_info",
                "is_dist_avail_and_initialized",
                "main_process",
                "MiniGPTv2",
            ), name


def test_modules_on_the_page_exist():
    """The right column of the table of modules names what is there."""
    table = TEXT.split("## Modules")[1].split("## Log")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `minigpt4")]
    assert len(rows) > 10
    for row in rows:
        now = row[2]
        for module, names in re.findall(r"`(minigpt4[\w.]+)`: ((?:`\w+`(?:, )?)+)", now):
            for each in re.findall(r"\w+", names):
                assert hasattr(importlib.import_module(module), each), (module, each)


def test_the_table_is_sorted():
    """Twice the same name would be an error of YAML's to some parsers, and silent to others."""
    lines = (ROOT / "minigpt4/assets/first_release.yaml").read_text(encoding="utf-8").splitlines()
    places = [line.rstrip(":") for line in lines if line.startswith("minigpt4")]
    assert places == sorted({name.rpartition(".")[0] for name in GONE})
    assert sum(line.startswith("  ") for line in lines) == len(GONE)
    assert list(GONE) == sorted(GONE, key=lambda name: name.rpartition(".")[::2])


@pytest.mark.parametrize(
    ("path", "line", "key"),
    [
        ("minigpt4/configs/models/minigpt4.yaml", 16, "llama_model"),
        ("eval_configs/minigpt4_eval.yaml", 11, "ckpt"),
        ("minigpt4/configs/datasets/laion/defaults.yaml", 5, "storage"),
        ("minigpt4/configs/datasets/cc_sbu/defaults.yaml", 5, "storage"),
        ("minigpt4/configs/datasets/cc_sbu/align.yaml", 5, "storage"),
    ],
)
def test_keys_are_in_the_lines_that_tutorials_name(path, line, key):
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    assert lines[line - 1].strip().startswith(f"{key}: ")
    assert f"line {line}, as in the first release" in "\n".join(lines[line - 2 : line]).lower()


@pytest.mark.parametrize(
    ("path", "searched", "answer"),
    [
        ("dataset/convert_laion.py", "rows = ", "--limit 1000"),
        ("dataset/convert_cc_sbu.py", "rows = ", "--limit 1000"),
        ("dataset/download_laion.sh", "--enable_wandb", "WANDB=True"),
        ("dataset/download_cc_sbu.sh", "--enable_wandb", "WANDB=True"),
        ("demo.py", "demo.launch(", "--share, --host 0.0.0.0 (server_name) and --port"),
    ],
)
def test_edits_of_lines_that_are_gone_are_answered_there(path, searched, answer):
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    assert any(searched in line and answer in line and line.strip().startswith("#") for line in lines)
