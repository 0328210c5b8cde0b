"""A GPU that is there and that torch cannot use ends a command; a machine without one falls back to the CPU."""

import re
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT
from packaging.requirements import Requirement

from minigpt4.cli import caption, chat
from minigpt4.common import dist_utils, gpus
from minigpt4.common.errors import ConfigError
from minigpt4.doctor import check_environment
from minigpt4.doctor.diagnostic import ERROR

TINY = ["--cfg-path", str(ROOT / "eval_configs/minigpt4_tiny_eval.yaml")]
NO_DEVICES = "echo No devices were found; exit 6"
LISTED = "[ $1 = -L ] && echo 'GPU 0: NVIDIA A100 (UUID: GPU-1)' || echo 'NVIDIA A100, 8.0, 81920, 81000'"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Function that puts a stand-in for nvidia-smi, a shell script, on the path. torch sees no GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(script: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    return make


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_that_torch_cannot_use(machine, monkeypatch, device):
    machine(LISTED)
    monkeypatch.setattr(torch.version, "cuda", "13.0")

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12000). Please update it.")

    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(ConfigError) as caught:
        dist_utils.select_device(device)
    for part in (
        f"run.device={device}: there is a GPU",
        "driver on your system is too old (found version 12000). CUDA 13.0",
        "needs driver 580 or newer",
        "docs/installation.md",
        "--options run.device=cpu",
    ):
        assert part in str(caught.value)
    assert dist_utils.select_device("cpu").type == "cpu"


def test_a_torch_without_cuda(machine, monkeypatch):
    machine(LISTED)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match="built without CUDA. Install torch with CUDA"):
        dist_utils.select_device("cuda")


def with_driver(version):
    others = '-L) echo "GPU 0: NVIDIA A100" ;; *) echo "NVIDIA A100, 8.0, 81920, 81000" ;;'
    return f'case "$*" in *driver_version*) echo {version} ;; {others} esac'


@pytest.mark.parametrize(
    ("driver", "cuda", "parts"),
    [
        ("525.147.05", "13.0", ["needs driver 580 or newer; yours is 525.147.05", gpus.TORCH_OF_CUDA_12]),
        ("535.104.05", "13.0", ["needs driver 580 or newer; yours is 535.104.05", gpus.TORCH_OF_CUDA_12]),
        ("470.82.01", "13.0", ["needs driver 580 or newer; yours is 470.82.01. Install driver 580 or newer."]),
        ("470.82.01", "12.6", ["needs driver 525 or newer; yours is 470.82.01"]),
        ("580.65.06", "13.0", ["Your driver 580.65.06 is new enough for its CUDA 13.0", "--gpus all"]),
        ("535.104.05", "12.6", ["Your driver 535.104.05 is new enough for its CUDA 12.6"]),
        ("580.65.06", None, ["built without CUDA. Install torch with CUDA (docs/installation.md)"]),
        ("535.104.05", None, ["built without CUDA. For your driver 535.104.05: ", gpus.TORCH_OF_CUDA_12]),
    ],
)
def test_drivers_and_torch_without_cuda_are_told_apart(machine, monkeypatch, capsys, driver, cuda, parts):
    """The three cases of doctor: the driver is too old for torch's CUDA, something else is wrong, there is no CUDA."""
    machine(with_driver(driver))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert gpus.driver_version() == driver
    context = SimpleNamespace(run=SimpleNamespace(device="cuda"), gpus=[])
    (problem,) = check_environment.check_torch_gpu(context)
    assert problem.status == ERROR
    for part in parts:
        assert part in problem.what


def test_a_torch_of_cuda_12_is_within_the_ranges():
    torch_version, torchvision = re.findall(r"==([\d.]+)", gpus.TORCH_OF_CUDA_12)
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    for name, version in (("torch", torch_version), ("torchvision", torchvision)):
        assert Requirement(re.search(rf"^{name}[><=,.\d]+", requirements, re.MULTILINE)[0]).specifier.contains(version)
    assert gpus.TORCH_OF_CUDA_12 in (ROOT / "docs/installation.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", [NO_DEVICES, None])
def test_a_machine_without_a_gpu_falls_back(machine, script, caplog, monkeypatch):
    machine(script) if script else monkeypatch.setenv("PATH", "/nowhere")
    dist_utils.warn_of_the_cpu.cache_clear()
    assert dist_utils.select_device("cuda").type == "cpu"
    assert "run.device=cuda, but there is no GPU" in caplog.text


def test_hidden_gpus_are_not_there(machine, monkeypatch):
    machine(LISTED)
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert dist_utils.select_device("cuda").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(ConfigError, match="check CUDA_VISIBLE_DEVICES=7"):
        dist_utils.select_device("cuda")


def test_a_driver_that_cannot_list_its_gpus(machine, monkeypatch):
    """It was updated, and the old one still runs."""
    machine("echo Failed to initialize NVML: Driver/library version mismatch; exit 18")
    monkeypatch.setattr(gpus.Path, "glob", lambda folder, pattern: iter([f"{folder}/nvidia0"]))
    assert gpus.is_there()
    monkeypatch.setattr(gpus.Path, "glob", lambda folder, pattern: iter([]))
    assert not gpus.is_there()


@pytest.mark.parametrize(
    ("capability", "compiled", "works"),
    [
        ((8, 6), ["sm_80", "sm_90"], True),
        ((8, 0), ["sm_75", "sm_86"], False),
        ((7, 0), ["sm_75", "sm_80", "compute_120"], False),
        ((12, 1), ["sm_90", "compute_90"], True),
        ((12, 1), ["sm_90a", "sm_120"], True),
        ((10, 3), ["sm_100a"], False),
        ((9, 0), ["gfx90a"], True),
    ],
)
def test_a_gpu_that_torch_has_no_kernels_for(monkeypatch, capability, compiled, works):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: compiled)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla")
    problem = gpus.unsupported_architecture(0)
    assert problem is None if works else f"capability {capability[0]}.{capability[1]}" in problem


def test_a_gpu_of_a_number_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"run\.device=cuda:5: this machine's GPUs are 0 to 1"):
        dist_utils.select_device("cuda:5")
    with pytest.raises(ConfigError, match="run.device='cuda:x'"):
        dist_utils.select_device("cuda:x")


def test_every_command_stops(machine, configs, monkeypatch, tmp_path):
    """Before it loads a model. demo.py and `serve` choose the device by the same function."""
    from train import main as train

    machine(LISTED)
    monkeypatch.setattr("minigpt4.conversation.loading.load_chat", lambda *_, **__: pytest.fail("loads"))
    monkeypatch.setattr("minigpt4.tasks.base_task.BaseTask.build_model", lambda *_: pytest.fail("loads"))
    picture = str(ROOT / "minigpt4/assets/examples/drawings/1_house.png")
    for command, arguments in (
        (chat.main, TINY),
        (caption.main, [picture, *TINY]),
        (caption.main, [picture, "--gpu-id", "0", *TINY]),
        (train, ["--cfg-path", str(configs["stage1"]), "--options", "run.device=cuda"]),
    ):
        with pytest.raises(ConfigError, match="run.device=cuda: there is a GPU"):
            command(arguments)
    assert not (tmp_path / "stage1").exists()  # the run's folder


def test_doctor_says_so(machine, capsys):
    from minigpt4.cli import doctor

    machine(LISTED)
    arguments = [*TINY, "--options", "run.amp=False"]
    assert doctor.main(arguments) == 1
    said = capsys.readouterr().out
    assert "ERROR   GPU: there is a GPU, but torch" in said and "run.device=cpu" in said
    assert "no NVIDIA GPU was found" not in said
    assert "GPU: there is a GPU" not in said.replace("ERROR   GPU: there is a GPU", "")
    doctor.main([*arguments, "--gpu-memory", "24"])  # another machine's
    doctor.main([*arguments[:3], "run.device=cpu"])
    assert ERROR.upper() not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("libc", "is_warned"), [(("glibc", "2.27"), True), (("glibc", "2.28"), False), (("", ""), False)]
)
def test_an_old_glibc_is_warned_of(monkeypatch, libc, is_warned):
    monkeypatch.setattr(check_environment.platform, "libc_ver", lambda: libc)
    found = [each for each in check_environment.check_versions(None) if each.check == "glibc"]
    assert bool(found) == is_warned
    assert not found or "2.27 is older than 2.28" in found[0].what
