"""Checks of the environment: libraries, device, GPU, shared memory."""

import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

from minigpt4.common import facts, gpus
from minigpt4.common.registry import UnknownNameError, registry
from minigpt4.common.text import pluralize
from minigpt4.doctor.diagnostic import WARNING, Diagnostic, error, ok, verdict, warning
from minigpt4.doctor.machine import Gpu, readable
from minigpt4.doctor.run_context import RunContext

LEAST_GLIBC = (2, 28)
# Packages that some runs need. `check_optional_libraries` reports them where the config asks for them.
OPTIONAL = ("bitsandbytes", "gradio", "sentencepiece")
# The least compute capability for bfloat16, torch's newest builds, bitsandbytes' 8 bit, and fp8.
BF16 = (8, 0)
TORCH_WHEELS = (7, 5)
BITS_8 = (7, 5)
FP8 = (9, 0)


def check_versions(context: RunContext) -> Iterator[Diagnostic]:
    """The libraries are in the ranges that are known to work. (The package itself refuses an older Python.)"""
    libc, glibc = platform.libc_ver()
    if libc == "glibc" and tuple(map(int, glibc.split("."))) < LEAST_GLIBC:
        what = f"{glibc} is older than 2.28, which the wheels of torch need"
        yield warning("glibc", what, "Use a newer system, or the container in docker/ (docs/installation.md).")
    missing, wrong = [], []
    for requirement in _requirements():
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if requirement.name not in OPTIONAL:
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


def check_optional_libraries(context: RunContext) -> Iterator[Diagnostic]:
    """Optional libraries that this config needs are installed."""
    needed = {}
    if context.load_in in ("8bit", "4bit"):
        needed["bitsandbytes"] = f"model.load_in={context.load_in} (low_resource: {context.model.low_resource})"
    if facts.is_gguf(context.model.llama_model):
        needed["gguf"] = "a .gguf file"
    if context.llm_folder and (context.llm_folder / "tokenizer.model").is_file():
        needed["sentencepiece"] = "the language model's tokenizer.model"
    if context.trained_parts.lora:
        needed["peft"] = "model.lora"
    for package, reason in needed.items():
        if find_spec(package) is None:
            extra = " Or --options model.low_resource=False model.load_in=16bit" if package == "bitsandbytes" else ""
            yield error("libraries", f"{package} is not installed; {reason} needs it", f"pip install {package}.{extra}")


def check_trackers(context: RunContext) -> Iterator[Diagnostic]:
    """Trackers are registered, and their packages installed."""
    for name in context.run.trackers if context.training else ():
        try:
            package = registry.get("tracker", name).package
        except UnknownNameError as mistake:
            yield error("run.trackers", str(mistake), "Change the name, or import the plug-in that registers it.")
            continue
        if package and find_spec(package) is None:
            yield error("run.trackers", f"{name} needs {package}, which is not installed", f"pip install {package}")


def check_device(context: RunContext) -> Iterator[Diagnostic]:
    """`run.device` is known. An Apple GPU needs a Mac, and a language model that bitsandbytes has not quantized."""
    kind = context.run.device.split(":")[0]
    if not re.fullmatch(gpus.DEVICE, context.run.device):
        what = f"{context.run.device!r} is not one of {', '.join(gpus.DEVICES)}"
        yield error("run.device", what, "--options run.device=cuda")
    if kind != "mps":
        return
    if sys.platform != "darwin":
        yield error("run.device", "mps is an Apple GPU, and this is no Mac", "--options run.device=cuda, or =cpu")
    if context.load_in in ("8bit", "4bit"):
        what = f"model.load_in={context.load_in} (low_resource: {context.model.low_resource})"
        fix = "--options model.low_resource=False model.load_in=16bit (or 8bit_weights), or run.device=cpu"
        yield error("run.device", f"is mps; {what} needs an NVIDIA GPU or a CPU", fix)


def check_gpu(context: RunContext) -> Iterator[Diagnostic]:
    """The GPU exists and has the types that the run computes in. `check_torch_gpu` asks whether torch can use it."""
    if not context.run.device.startswith("cuda"):
        return
    if not context.gpus:
        if not gpus.is_there():
            what = "no NVIDIA GPU was found: the run falls back to the CPU"
            yield warning("GPU", what, "With a GPU: check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES.")
        return
    if "+cpu" in metadata.version("torch"):
        what = f"torch {metadata.version('torch')} is built for CPUs only"
        yield error("GPU", what, f"Install torch with CUDA. {gpus.ON_THE_CPU}")
        return
    gpu, name = _weakest(context.gpus)
    if gpu.capability < TORCH_WHEELS:
        fix = "Install a torch that still supports it (built for CUDA 12.6), or use another GPU."
        yield warning("GPU", f"{name}: torch's newest builds need 7.5 or more", fix)
    if context.run.amp and context.run.amp_dtype == "bf16" and gpu.capability < BF16:
        yield error("run.amp_dtype", f"{name} has no bfloat16, which needs 8.0", "--options run.amp_dtype=fp16")
    if context.load_in == "8bit" and gpu.capability < BITS_8:
        what = f"{name} is too old for bitsandbytes' 8 bit, which needs 7.5"
        yield error("model.load_in", what, "--options model.load_in=8bit_weights (without bitsandbytes), or 4bit")
    if context.local_size > len(context.gpus) and context.training:
        what = f"{context.local_size} processes on {pluralize(len(context.gpus), 'GPU')} of this machine"
        yield warning("GPU", what, f"On one machine: torchrun --nproc_per_node {len(context.gpus)}")
    if gpu.capability >= TORCH_WHEELS:
        yield ok("GPU", f"{len(context.gpus)} × {name}, {readable(gpu.total)}")


def check_torch_gpu(context: RunContext) -> Iterator[Diagnostic]:
    """torch can use the GPU that is in this machine. A GPU that is only assumed need not be."""
    if not context.run.device.startswith("cuda") or any(gpu.imagined for gpu in context.gpus):
        return
    problem = gpus.why_unusable()
    if not problem and context.gpus:
        problem = next(filter(None, map(gpus.unsupported_architecture, range(len(context.gpus)))), None)
    if problem:
        yield error("GPU", problem, gpus.ON_THE_CPU)


def _weakest(gpus: list[Gpu]) -> tuple[Gpu, str]:
    """The GPU of the least compute capability, and its description."""
    gpu = min(gpus, key=lambda gpu: gpu.capability)
    major, minor = gpu.capability
    return gpu, f"{gpu.name}, compute capability {major}.{minor}"


def check_fp8(context: RunContext) -> Iterator[Diagnostic]:
    """Training in fp8 has the GPU, type and layers that it needs. The run itself asks only after loading."""
    if not context.run.fp8 or not context.training:
        return
    off = "--options run.fp8=False"
    if not context.on_gpu:
        found = "none was found" if context.run.device.startswith("cuda") else f"run.device is {context.run.device}"
        yield error("run.fp8", f"needs an NVIDIA GPU of compute capability 9.0 or newer; {found}", off)
    else:
        gpu, name = _weakest(context.gpus)
        if gpu.capability < FP8:
            yield error("run.fp8", f"{name} has no row-wise fp8 matrix product, which needs 9.0", off)
    if not context.run.amp or context.run.amp_dtype == "fp16":
        what = f"goes with bfloat16, not with run.amp={context.run.amp} run.amp_dtype={context.run.amp_dtype}"
        yield error("run.fp8", what, f"{off}, or run.amp=True run.amp_dtype=bf16")
    if context.load_in != "16bit":
        what = f"model.load_in={context.load_in} leaves no 16-bit layers that could be in fp8"
        yield error("run.fp8", what, f"{off}, or model.load_in=16bit")


def check_shared_memory(context: RunContext) -> Iterator[Diagnostic]:
    """Shared memory, of which containers have little, has room for the batches of the worker processes."""
    shm = Path("/dev/shm")
    if not context.training or not context.run.num_workers or not shm.is_dir():
        return
    # Each worker is two batches ahead. A pixel takes three bytes.
    batch = context.run.batch_size_train * 3 * context.model.image_size**2
    needed = 2 * context.run.num_workers * batch * context.local_size
    free = shutil.disk_usage(shm).free
    what = f"batches of the workers take up to {readable(needed)}; /dev/shm has {readable(free)} free"
    fix = "docker run --shm-size=8g (or --ipc=host), or lower run.num_workers."
    yield verdict(needed > free, "shared memory", what, fix, WARNING)
