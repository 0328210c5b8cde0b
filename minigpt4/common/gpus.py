"""The values of `run.device`, and the GPUs that are in the machine, whether or not torch can use them.

torch is imported only by `why_unusable`.
"""

import os
import re
import subprocess
from pathlib import Path

DEVICES = ("cuda", "cpu", "mps")
DEVICE = rf"({'|'.join(DEVICES)})(:\d+)?"
# The oldest driver for each CUDA that torch is built with (NVIDIA's table of minor version compatibility).
OLDEST_DRIVER = {"12": 525, "13": 580}
# The newest torch that is known to be built with CUDA 12, for drivers from 525 up (docs/installation.md).
TORCH_OF_CUDA_12 = "pip install torch==2.12.0 torchvision==0.27.0 --index-url https://download.pytorch.org/whl/cu126"
SECONDS = 30  # for nvidia-smi, which may hang with its driver
ON_THE_CPU = "To run on the CPU: --options run.device=cpu"


def is_there() -> bool:
    """Whether NVIDIA's driver lists a GPU, and CUDA_VISIBLE_DEVICES does not hide all of them.

    A driver that cannot list them, such as one that was updated without a restart, has their device files.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return False
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=SECONDS)
    except OSError:
        return False
    except subprocess.TimeoutExpired:  # a driver that hangs has its device files
        return any(Path("/dev").glob("nvidia[0-9]*"))
    if listed.returncode == 0 or "No devices" in listed.stdout:
        return bool(listed.stdout.strip()) and "No devices" not in listed.stdout
    return any(Path("/dev").glob("nvidia[0-9]*"))


def query(fields: str) -> list[str]:
    """What nvidia-smi answers about these fields: a line for each GPU. Empty if there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS)
    except (OSError, subprocess.SubprocessError):
        return []
    return shown.stdout.splitlines()


def driver_version() -> str | None:
    """The version of NVIDIA's driver, such as "535.104.05"; None: it does not tell."""
    return next((line for line in query("driver_version") if re.fullmatch(r"\d+(\.\d+)+", line)), None)


def why_unusable() -> str | None:
    """Why torch cannot use the GPU that is there, and what to install; None: it can, or there is no GPU."""
    import torch

    if torch.cuda.is_available() or not is_there():
        return None
    reason, fix = _reason_and_fix(driver_version())
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        fix += f" Or check CUDA_VISIBLE_DEVICES={visible}."
    return f"there is a GPU, but torch {torch.__version__} cannot use it: {reason}. {fix}"


def _reason_and_fix(driver: str | None) -> tuple[str, str]:
    """Three cases: torch is built without CUDA; with one that is too new for the driver; or something else is wrong."""
    import torch

    version, major = torch.version.cuda, int(driver.split(".")[0]) if driver else None
    oldest = OLDEST_DRIVER.get(version.split(".")[0]) if version else max(OLDEST_DRIVER.values())
    is_too_old = major and oldest and major < oldest
    with_cuda_12 = f"{TORCH_OF_CUDA_12} (docs/installation.md)" if is_too_old and major >= OLDEST_DRIVER["12"] else ""
    if version is None and is_too_old:
        fix = with_cuda_12 or f"Install driver {oldest} or newer first (docs/installation.md)"
        return "it is built without CUDA", f"For your driver {driver}: {fix}."
    if version is None:
        return "it is built without CUDA", "Install torch with CUDA (docs/installation.md)."
    if is_too_old:
        fix = f"Install driver {oldest} or newer" + (
            f", or a torch for this driver: {with_cuda_12}" * bool(with_cuda_12)
        )
        return f"CUDA {version}, which it is built with, needs driver {oldest} or newer; yours is {driver}", f"{fix}."
    try:
        torch.cuda.init()
        reason = "it finds none"
    except Exception as error:  # its types are not documented
        reason = re.split(r"[.\n]\s", f"{error} ")[0].strip().rstrip(".")
    if major and oldest:
        return reason, (
            f"Your driver {driver} is new enough for its CUDA {version}. After an update of the driver, restart the "
            "machine; start a container with --gpus all."
        )
    needed = f"driver {oldest} or newer" if oldest else "a newer driver"
    return reason, (
        f"CUDA {version}, which it is built with, needs {needed}; nvidia-smi shows yours. Install that driver, or a "
        "torch built with an older CUDA (docs/installation.md)."
    )


def unsupported_architecture(index: int) -> str | None:
    """Why torch's kernels do not run on GPU `index`, which it sees, and what to install; None: they do."""
    import torch

    compiled = [re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name) for name in torch.cuda.get_arch_list()]
    if None in compiled or not compiled:  # of another maker
        return None
    try:
        own = torch.cuda.get_device_capability(index)
    except (AssertionError, RuntimeError):  # the first use of the GPU says more
        return None
    for match in compiled:
        built = int(match[2]), int(match[3])
        # Machine code runs on later minor versions; PTX is compiled for any later GPU.
        if own == built or (not match[4] and built <= own and (match[1] == "compute" or own[0] == built[0])):
            return None
    return (
        f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(index)}, compute capability "
        f"{own[0]}.{own[1]}; it has {', '.join(match[0] for match in compiled)}. Install a torch that supports it "
        "(docs/installation.md)."
    )
