"""config.yaml and environment.json in a run's folder: how it was started, and how to start it again."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from omegaconf import OmegaConf

from minigpt4 import PACKAGE_ROOT
from minigpt4.common.config import Config

CONFIG, ENVIRONMENT = "config.yaml", "environment.json"
# Variables that change what a run does. No others are written: some hold keys.
VARIABLES = re.compile(
    r"(CUDA|NCCL|GLOO|OMP|MKL|TORCH|PYTORCH|TORCHELASTIC|TRITON|TRANSFORMERS)_\w+|(LOCAL_)?WORLD_SIZE|PYTHONPATH"
    r"|PYTHONHASHSEED|HF_(HOME|HUB_OFFLINE|ENDPOINT)|WANDB_(MODE|PROJECT)|TRACKIO_(DIR|PROJECT)"
)
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH")
GIT_SECONDS = 10
LONGEST_DIFF = 1_000_000  # characters


def write_run_files(cfg: Config, folder: Path, processes: int) -> None:
    """Write config.yaml, which `train.py --cfg-path` takes as it is, and environment.json. processes: ranks."""
    path = folder / CONFIG
    about = without_passwords(json.dumps(environment(cfg, path, processes), indent=2))
    (folder / ENVIRONMENT).write_text(about + "\n", encoding="utf-8")
    start = f"# All settings of this run, defaults included. To start it again:\n#   {_again(path, processes)}\n"
    path.write_text(start + OmegaConf.to_yaml(OmegaConf.create(cfg.to_dict())), encoding="utf-8")


def environment(cfg: Config, path: Path, processes: int) -> dict[str, Any]:
    """The command, the machine, versions and git's state, and the settings that differ from the defaults."""
    versions = {each.metadata["Name"]: each.version for each in metadata.distributions()}
    chosen = {name: value for name, value in sorted(os.environ.items()) if VARIABLES.fullmatch(name)}
    return {
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": sys.orig_argv,
        "again": _again(path, processes),
        "working_directory": os.getcwd(),
        "processes": processes,
        "machine": _machine(),
        "python": sys.version,
        "packages": dict(sorted(versions.items(), key=lambda item: str(item[0]).lower())),
        "variables": {name: value for name, value in chosen.items() if not SECRET.search(name)},
        "git": git_states(PACKAGE_ROOT, Path.cwd()),
        "changed_settings": {key: list(values) for key, values in cfg.changes().items()},
    }


def git_states(*folders: Path) -> list[dict[str, Any]]:
    """Commit, branch, remote, changes and new files of the repositories that hold these folders, if there are any."""
    states = {}
    for folder in folders:
        top = _git(folder, "rev-parse", "--show-toplevel")
        commit = _git(folder, "rev-parse", "HEAD")
        if not top or not commit or top in states:
            continue
        diff = _git(Path(top), "diff", "HEAD", "--no-ext-diff", "--no-color")
        states[top] = {
            "folder": top,
            "commit": commit,
            "branch": _git(folder, "branch", "--show-current"),
            "remote": without_passwords(_git(folder, "config", "--get", "remote.origin.url")),
            "new_files": _git(Path(top), "ls-files", "--others", "--exclude-standard").splitlines()[:100],
            "diff": diff if len(diff) <= LONGEST_DIFF else f"{diff[:LONGEST_DIFF]}\n… ({len(diff)} characters)",
        }
    return list(states.values())


def _git(folder: Path, *arguments: str) -> str:
    """What git prints; nothing without git or a repository."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        shown = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return ""
    return shown.stdout.decode(errors="replace").strip() if shown.returncode == 0 else ""


def _machine() -> dict[str, Any]:
    driver, torch = Path("/proc/driver/nvidia/version"), sys.modules.get("torch")
    gpus = torch.cuda.device_count() if torch and torch.cuda.is_initialized() else 0
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(number) for number in range(gpus)],
        "driver": driver.read_text().splitlines()[0] if driver.is_file() else None,
    }


def _again(path: Path, processes: int) -> str:
    """The command that starts the run again, in its working directory."""
    paths = os.environ.get("PYTHONPATH")
    start = f"PYTHONPATH={shlex.quote(paths)} " if paths else ""
    python = f"torchrun --nproc_per_node {processes}" if processes > 1 else "python"
    return f"{start}{python} train.py --cfg-path {shlex.quote(str(path))}"


def without_passwords(text: str) -> str:
    """A text, such as JSON, without what stands before the @ in addresses."""
    return re.sub(r"(?<=://)[^/@\s]+(?=@)", "…", text)
