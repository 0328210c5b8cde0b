"""Whether memory and open files stay level in a long run. By hand: python tests/soak.py --steps 20000 --workers 4

Trains a very small model from a dataset with a length and a stream. Prints, for each of 20 moments, the
memory (MiB; pages that processes share count once, those of files, such as libraries, not at all: their share
depends on other processes of the machine) and the open files of the process and its workers.
"""

import argparse
import logging
import tempfile
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from minigpt4.common.config import Config
from minigpt4.datasets.workers import name_dead_workers
from minigpt4.runners import RunnerBase
from minigpt4.tasks import BaseTask

MOMENTS = 20
# The growth that is allowed between the middle and the end.
GROWTH = 0.01


class Noise(Dataset):
    def __len__(self):
        return 1000

    def __getitem__(self, index):
        return {"image": torch.rand(3, 8, 8), "text_input": f"sample {index}", "image_id": str(index)}


class EndlessNoise(Noise, IterableDataset):
    def __iter__(self):
        while True:
            yield from (self[index] for index in range(len(self)))


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(192, 1)

    def forward(self, samples):
        return {"loss": self.linear(samples["image"].flatten(1)).square().mean(), "num_labels": len(samples["image"])}


def memory_of(pid: int) -> float:
    """MiB of a process, as Linux counts it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:"))) / 2**10


class Measured(RunnerBase):
    """Measures after every `every` updates."""

    every, found = 1, ()

    def after_update(self, epoch, item):
        super().after_update(epoch, item)
        if self.step % self.every == 0:
            processes = [own := psutil.Process(), *own.children(recursive=True)]
            memory = sum(memory_of(process.pid) for process in processes)
            self.found = [*self.found, (self.step, memory, sum(process.num_fds() for process in processes))]


def measure(folder: Path, steps: int, workers: int) -> list[tuple[int, float, int]]:
    """(step, MiB, open files) at MOMENTS moments of a run."""
    path = folder / "run.yaml"
    path.write_text("run: {amp: False, device: cpu}\n")
    run = {"output_dir": folder / "output", "num_workers": workers, "batch_size_train": 4, "max_epoch": 2}
    run |= {"iters_per_epoch": steps // 2, "save_every_steps": max(steps // 8, 1), "log_freq": 50}
    options = [f"run.{name}={value}" for name, value in run.items()]
    cfg = Config(SimpleNamespace(cfg_path=str(path), options=options))
    datasets = {"records": {"train": Noise()}, "stream": {"train": EndlessNoise()}}
    runner = Measured(cfg, BaseTask(), Small(), datasets, "soak")
    runner.every = max(steps // MOMENTS, 1)
    with name_dead_workers():
        runner.train()
    return list(runner.found)


def is_level(found: list[tuple[int, float, int]]) -> bool:
    """Whether neither memory nor open files grow by more than GROWTH from the middle to the end."""
    _, memory, files = zip(*found[len(found) // 2 :], strict=True)
    return all(each[-1] <= (1 + GROWTH) * each[0] for each in (memory, files))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), args.steps, args.workers)
    for step, memory, files in found:
        print(f"step {step:6d}  {memory:8.1f} MiB  {files} files")
    print("level" if is_level(found) else "NOT level")
    return 0 if is_level(found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
