"""Checks of the machine: libraries, GPU, shared memory."""

import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from minigpt4.common.schema import DEVICES
from minigpt4.common.text import pluralize
from minigpt4.doctor.case import RunContext
from minigpt4.doctor.findings import Diagnostic, error, ok, warning
from minigpt4.doctor.machine import Gpu, readable

LEAST_PYTHON = (3, 11)
# Least compute capability for …
BF16 = (8, 0)
TORCH_WHEELS = (7, 5)
BITS_8 = (7, 5)
FP8 = (9, 0)


def check_versions(case: RunContext) -> Iterator[Diagnostic]:
    """Python and the libraries are in the ranges that are known to work."""
    if sys.version_info < LEAST_PYTHON:
        yield error("python", f"{sys.version.split()[0]} is older than 3.11", "Make an environment with a newer one.")
    missing, wrong = [], []
    for requirement in _requirements():
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            # what can be left out is reported where it is asked for
            if requirement.name not in ("bitsandbytes", "gradio", "sentencepiece"):
                missing.append(requirement.name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    fix = "pip install --constraint requirements.lock --editable ."
    if missing:
        yield error("libraries", f"{', '.join(missing)} not installed", fix)
    if wrong:
        yield warning("libraries", f"{'; '.join(wrong)}, the range that is known to work", fix)
    if not missing and not wrong:
        yield ok("libraries", f"Python {sys.version.split()[0]}, torch {metadata.version('torch')}")


def _requirements() -> list[Requirement]:
    try:
        lines = metadata.requires("minigpt4") or []
    except metadata.PackageNotFoundError:
        return []
    requirements = map(Requirement, lines)
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def check_optional_libraries(case: RunContext) -> Iterator[Diagnostic]:
    """What this config needs beyond the rest is installed."""
    needed = {}
    if case.load_in in ("8bit", "4bit"):
        needed["bitsandbytes"] = f"model.load_in={case.load_in} (low_resource: {case.model.low_resource})"
    if str(case.model.llama_model).endswith(".gguf"):
        needed["gguf"] = "a .gguf file"
    if case.llm_folder and (case.llm_folder / "tokenizer.model").is_file():
        needed["sentencepiece"] = "the language model's tokenizer.model"
    for package, reason in needed.items():
        if find_spec(package) is None:
            extra = " Or --options model.low_resource=False model.load_in=16bit" if package == "bitsandbytes" else ""
            yield error("libraries", f"{package} is not installed; {reason} needs it", f"pip install {package}.{extra}")


def check_device(case: RunContext) -> Iterator[Diagnostic]:
    """`run.device` is known, and where it is an Apple GPU, this is a Mac, and the weights are of a kind it takes."""
    kind = case.run.device.split(":")[0]
    if kind not in DEVICES:
        what = f"{case.run.device!r} is not one of {', '.join(DEVICES)}"
        yield error("run.device", what, "--options run.device=cuda")
    if kind != "mps":
        return
    if sys.platform != "darwin":
        yield error("run.device", "mps is an Apple GPU, and this is no Mac", "--options run.device=cuda, or =cpu")
    if case.load_in in ("8bit", "4bit"):
        what = f"model.load_in={case.load_in} (low_resource: {case.model.low_resource}) needs an NVIDIA GPU or a CPU"
        fix = "--options model.low_resource=False model.load_in=16bit (or 8bit_weights), or run.device=cpu"
        yield error("run.device", f"is mps; {what}", fix)


def check_gpu(case: RunContext) -> Iterator[Diagnostic]:
    """The GPU is there, and computes in the types that are asked for."""
    if not case.run.device.startswith("cuda"):
        return
    if not case.gpus:
        what = "no NVIDIA GPU is to be seen: the run falls back to the CPU"
        yield warning("GPU", what, "With a GPU: check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES.")
        return
    if "+cpu" in metadata.version("torch"):
        yield error("GPU", f"torch {metadata.version('torch')} is built for CPUs only", "Install torch with CUDA.")
        return
    gpu, name = _weakest(case.gpus)
    if gpu.capability < TORCH_WHEELS:
        fix = "Install a torch that still supports it (built for CUDA 12.6), or use another GPU."
        yield warning("GPU", f"{name}: torch's newest builds want 7.5 and more", fix)
    if case.run.amp and case.run.amp_dtype == "bf16" and gpu.capability < BF16:
        yield error("run.amp_dtype", f"{name} has no bfloat16, which needs 8.0", "--options run.amp_dtype=fp16")
    if case.load_in == "8bit" and gpu.capability < BITS_8:
        what = f"{name} is older than bitsandbytes' 8 bit wants, 7.5"
        yield error("model.load_in", what, "--options model.load_in=8bit_weights (without bitsandbytes), or 4bit")
    if case.local_size > len(case.gpus) and case.training:
        what = f"{case.local_size} processes on {pluralize(len(case.gpus), 'GPU')} of this machine"
        yield warning("GPU", what, f"On one machine: torchrun --nproc_per_node {len(case.gpus)}")
    if gpu.capability >= TORCH_WHEELS:
        yield ok("GPU", f"{len(case.gpus)} × {name}, {readable(gpu.total)}")


def _weakest(gpus: list[Gpu]) -> tuple[Gpu, str]:
    """The GPU that can do least, and what to call it."""
    gpu = min(gpus, key=lambda gpu: gpu.capability)
    major, minor = gpu.capability
    return gpu, f"{gpu.name}, compute capability {major}.{minor}"


def check_fp8(case: RunContext) -> Iterator[Diagnostic]:
    """Training in fp8 has the GPU, type and layers that it needs. The run (models/fp8.py) asks once all is loaded."""
    if not case.run.fp8 or not case.training:
        return
    off = "--options run.fp8=False"
    if not case.on_gpu:
        found = "none is to be seen" if case.run.device.startswith("cuda") else f"run.device is {case.run.device}"
        yield error("run.fp8", f"needs an NVIDIA GPU of compute capability 9.0 or newer; {found}", off)
    else:
        gpu, name = _weakest(case.gpus)
        if gpu.capability < FP8:
            yield error("run.fp8", f"{name} has no fp8 product by rows, which needs 9.0", off)
    if not case.run.amp or case.run.amp_dtype == "fp16":
        what = f"goes with bfloat16, not with run.amp={case.run.amp} run.amp_dtype={case.run.amp_dtype}"
        yield error("run.fp8", what, f"{off}, or run.amp=True run.amp_dtype=bf16")
    if case.load_in != "16bit":
        what = f"model.load_in={case.load_in} leaves no 16-bit layers that could be in fp8"
        yield error("run.fp8", what, f"{off}, or model.load_in=16bit")


def check_shared_memory(case: RunContext) -> Iterator[Diagnostic]:
    """Worker processes hand batches over in shared memory, which containers are given little of."""
    shm = Path("/dev/shm")
    if not case.training or not case.run.num_workers or not shm.is_dir():
        return
    # two batches ahead for each worker, three bytes a pixel
    batch = case.run.batch_size_train * 3 * case.model.image_size**2
    needed = 2 * case.run.num_workers * batch * case.local_size
    free = shutil.disk_usage(shm).free
    what = f"batches on their way take up to {readable(needed)}; /dev/shm has {readable(free)} free"
    if needed > free:
        yield warning("shared memory", what, "docker run --shm-size=8g (or --ipc=host), or lower run.num_workers.")
    else:
        yield ok("shared memory", what)
