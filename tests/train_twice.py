"""Train the tiny model in processes of their own, to compare the runs."""

import os
import subprocess
import sys
from pathlib import Path

from dataset_files import write_align, write_shards
from helpers import ROOT


def write_data(folder: Path) -> list[str]:
    """Two streams of shards and a dataset with a length. Returns the options that name them."""
    storage = {name: f"{write_shards(folder / name, 3, 40)}/*.tar" for name in ("laion", "cc_sbu")}
    storage["cc_sbu_align"] = str(write_align(folder / "align", 96))
    return [f"datasets.{name}.build_info.storage={place}" for name, place in storage.items()]


def start(folder: Path, hash_seed: int, options: list[str]) -> subprocess.Popen:
    """Start a run in `folder`. Python hashes strings in another way for each `hash_seed`."""
    config = "train_configs/minigpt4_tiny_stage1_pretrain.yaml"
    settings = ["run.num_workers=2", "run.log_freq=1", "run.report=False", *options]
    command = [sys.executable, "train.py", "--cfg-path", config, "--options", f"run.output_dir={folder}/output"]
    env = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "1"}
    folder.mkdir(parents=True)
    with open(folder / "out.txt", "w") as file:
        return subprocess.Popen([*command, *settings], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)


def finish(folder: Path, process: subprocess.Popen) -> Path:
    """Wait for a run. Returns its folder."""
    assert process.wait(400) == 0, (folder / "out.txt").read_text()[-3000:]
    (run,) = (folder / "output").iterdir()
    return run


def train_twice(folder: Path, options: list[str]) -> tuple[Path, Path]:
    """The folders of two runs with the same settings, which run at the same time."""
    folders = folder / "first", folder / "second"
    processes = [start(each, number, options) for number, each in enumerate(folders)]
    return tuple(finish(each, process) for each, process in zip(folders, processes, strict=True))
