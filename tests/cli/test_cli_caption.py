"""python -m minigpt4 caption."""

import json
import shutil
import subprocess
import sys
import tarfile

import pytest
import torch
from helpers import GOLDEN, ROOT

from minigpt4.__main__ import main

IMAGES = sorted((GOLDEN / "images").glob("*.png"))


@pytest.fixture
def run(golden_config, tmp_path):
    """run(*arguments) describes pictures into a file; gives (status, lines)."""

    def command(*arguments):
        out = tmp_path / "out.jsonl"
        torch.manual_seed(0)  # the model's vision side is random
        status = main(
            ["caption", *map(str, arguments), "--out", str(out), "--cfg-path", str(golden_config)]
            + ["--max-new-tokens", "8"]
        )
        return status, [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []

    return command


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures" / "deep").mkdir(parents=True)
    for n, path in enumerate(IMAGES):
        shutil.copy(path, tmp_path / "pictures" / ("deep" if n else "") / path.name)
    return tmp_path / "pictures"


def test_pictures_folders_and_shards(run, folder, tmp_path):
    status, lines = run(*IMAGES)
    assert status == 0
    assert [line["image"] for line in lines] == [str(path) for path in IMAGES]
    (tmp_path / "out.jsonl").unlink()
    status, of_folder = run("--dir", folder)
    assert {line["image"] for line in of_folder} == {str(path) for path in folder.rglob("*.png")}
    (tmp_path / "out.jsonl").unlink()
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard:05}.tar", "w") as tar:
            for path in IMAGES[shard::2]:
                tar.add(path, f"{path.stem}.png")
                tar.add(ROOT / "train.py", f"{path.stem}.txt")
    status, of_shards = run("--shards", tmp_path / "{00000..00001}.tar")
    assert [line["image"] for line in of_shards] == [
        f"{tmp_path}/{shard:05}.tar/{path.stem}.png" for shard in range(2) for path in IMAGES[shard::2]
    ]


def test_goes_on_where_it_stopped(run, folder, tmp_path):
    _, lines = run("--dir", folder)
    out = tmp_path / "out.jsonl"
    text = out.read_text()
    out.write_text(text[: text.index("\n") + 15])  # the second line was cut short
    _, again = run("--dir", folder)
    assert [line["image"] for line in again] == [line["image"] for line in lines]
    (tmp_path / "out.jsonl.part1").write_text(text.splitlines()[0] + "\n{")  # left by a run of several ranks
    out.unlink()
    _, again = run("--dir", folder)
    assert sorted(line["image"] for line in again) == sorted(line["image"] for line in lines)
    assert not list(tmp_path.glob("*.part*"))


def test_unreadable_files_are_skipped_and_listed(run, folder, caplog):
    (folder / "bad.png").write_text("x")
    (folder / "notes.txt").write_text("no picture")
    status, lines = run("--dir", folder)
    assert status == 1
    assert len(lines) == len(IMAGES)
    assert "1 pictures were skipped" in caplog.text
    assert "bad.png is not a picture" in caplog.text


def test_prompts(run, golden_config, monkeypatch):
    from minigpt4.models import MiniGPT4

    prompts = []
    monkeypatch.setattr(
        MiniGPT4, "generate", lambda self, images, texts, **o: prompts.append(texts) or ["x"] * len(texts)
    )
    template = ["--options", "model.prompt_template=###Human: {} ###Assistant: "]
    run(IMAGES[0])
    run(IMAGES[1], "--prompt", "What is it?", *template)
    run(IMAGES[2], "--prompt", "<ImageHere> is", *template)
    assert prompts == [
        ["<ImageHere>"],
        ["###Human: <Img><ImageHere></Img> What is it? ###Assistant: "],
        ["<ImageHere> is"],
    ]


def test_batches_equal_single_pictures(run, tmp_path):
    _, together = run(*IMAGES)
    (tmp_path / "out.jsonl").unlink()
    _, single = run(*IMAGES, "--batch-size", 1)
    assert together == single
    assert len({line["caption"] for line in single}) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dir", "/nowhere"], "--dir /nowhere is not a folder"),
        (["--shards", "/nowhere/{0..1}.tar"], "there is no file /nowhere/0.tar"),
    ],
)
def test_wrong_arguments(run, golden_config, arguments, message):
    assert message in main(["caption", *arguments, "--cfg-path", str(golden_config)])


def test_several_ranks(golden_config, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master-port", "29731"]
    command += ["-m", "minigpt4", "caption", *map(str, IMAGES), "--out", str(tmp_path / "out.jsonl")]
    command += ["--cfg-path", str(golden_config), "--max-new-tokens", "5"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sorted(line["image"] for line in lines) == sorted(map(str, IMAGES))
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl"]
