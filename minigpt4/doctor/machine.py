"""The machine: GPUs, memory, disks. NVIDIA's own library describes the GPUs, so that torch is not needed."""

import ctypes
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

MIB = 2**20


@dataclass(frozen=True)
class Gpu:
    """A GPU. Memory in bytes; capability as (8, 0)."""

    name: str
    capability: tuple[int, int]
    total: int
    free: int


def list_gpus() -> list[Gpu]:
    """The NVIDIA GPUs that CUDA_VISIBLE_DEVICES allows. Empty if there is no driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    if nvml.nvmlInit_v2():
        return []
    try:
        count = ctypes.c_uint()
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        gpus = [_ask(nvml, index) for index in range(count.value)]
    finally:
        nvml.nvmlShutdown()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not all(part.strip().isdigit() for part in visible.split(",") if part):
        return gpus  # UUIDs and slices of GPUs are not supported here
    return [gpus[int(part)] for part in visible.split(",") if part and int(part) < len(gpus)]


def imagined_gpu(gigabytes: float) -> Gpu:
    """An unused, recent GPU that is sold with this many GB, which are GiB."""
    size = int(gigabytes * 2**30)
    return Gpu(f"a GPU of {gigabytes:g} GB", (8, 0), size, size)


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def _ask(nvml, index: int) -> Gpu:
    device, name, memory = ctypes.c_void_p(), ctypes.create_string_buffer(96), _Memory()
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device))
    nvml.nvmlDeviceGetName(device, name, len(name))
    nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
    nvml.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
    return Gpu(name.value.decode(), (major.value, minor.value), memory.total, memory.free)


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
    path = _existing(path)
    return path.is_dir() and os.access(path, os.W_OK)


def _existing(path: Path) -> Path:
    """`path`, or if it does not exist, the lowest of its parents that does."""
    while not path.exists():
        path = path.absolute().parent
    return path
