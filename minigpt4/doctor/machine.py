"""The machine: GPUs, memory, disks. nvidia-smi describes the GPUs, so that torch is not needed."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from minigpt4.common.gpus import query

MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """A GPU. Memory in bytes; capability as (8, 0)."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int
    imagined: bool = False
    """Whether it is assumed, for an estimate."""


def list_gpus() -> list[Gpu]:
    """The NVIDIA GPUs that CUDA_VISIBLE_DEVICES allows. Empty if there is no driver."""
    gpus: dict[int, Gpu] = {}
    for number, line in enumerate(query("name,compute_cap,memory.total,memory.free")):
        try:
            name, capability, total, free = line.rsplit(", ", 3)
            major, minor = map(int, capability.split("."))
        except ValueError:  # a GPU that does not answer
            continue
        # A GPU that shares the host's memory has none of its own: "[N/A]".
        sizes = [int(size) * MIB if size.isdigit() else available_memory() for size in (total, free)]
        gpus[number] = Gpu(name, (major, minor), *sizes)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not all(part.strip().isdigit() for part in visible.split(",") if part):
        return list(gpus.values())  # UUIDs and slices of GPUs are not supported here
    return [gpus[int(part)] for part in visible.split(",") if part and int(part) in gpus]


def imagined_gpu(gigabytes: float) -> Gpu:
    """An unused, recent GPU that is sold with this many GB, which are GiB."""
    size = int(gigabytes * 2**30)
    return Gpu(f"a GPU of {gigabytes:g} GB", (8, 0), size, size, imagined=True)


def readable(size: float) -> str:
    """Bytes for people: `1.9 GB`, `40 MB`, `0.4 MB`."""
    if size >= 1e8:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"


def available_memory() -> int:
    """Bytes of host memory that programs can still have."""
    return psutil.virtual_memory().available


def free_disk(path: Path) -> int:
    """Free bytes where `path` is, or will be."""
    return shutil.disk_usage(_existing(path)).free


def is_writable(path: Path) -> bool:
    """Whether the folder `path` can be made, or written to."""
    if any(each.is_symlink() and not each.exists() for each in (path, *path.parents)):
        return False  # no folder can be made in the place of a broken link
    path = _existing(path)
    return path.is_dir() and os.access(path, os.W_OK)


def _existing(path: Path) -> Path:
    """`path`, or if it does not exist, the lowest of its parents that does."""
    while not path.exists():
        path = path.absolute().parent
    return path
