"""A tutorial of 2023 is typed from the lists to the answers: tests/tutorial.sh, with stand-ins for the downloads."""

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from dataset_files import picture_bytes, write_align
from helpers import ROOT, SMALL_SIZES

from minigpt4.benchmarks.make_random_weights import main as make_random_weights
from minigpt4.common import facts

PARTS = ("minigpt4", "dataset", "train_configs", "eval_configs", "prompts", "train.py", "demo.py")


class Pictures(BaseHTTPRequestHandler):
    """Serves a picture at every path."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(picture_bytes(len(self.path), size=70, format="JPEG"))

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def sizes() -> str:
    """The options of models as small as those of make-random-weights --size small. The encoder is in the cache."""
    keys = {f"{part}.{key}": value for part, values in SMALL_SIZES.items() for key, value in values.items()}
    keys["vit_weights"] = next(url for url in facts.PUBLISHED_KIB if "eva_vit_g" in url)
    return " ".join(f"model.{key}={value}" for key, value in keys.items())


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("shell", "data_only"), [("sh", "no"), ("bash", "yes")])
def test_the_tutorial(tmp_path, web, shell, data_only):
    work = tmp_path / "work"
    repository = work / "MiniGPT-4"
    repository.mkdir(parents=True)
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, repository / part)
    make_random_weights(["--out", str(work / "weights"), "--size", "small", "--vicuna", "v0", "--bin"])
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    for name in ("eva_vit_g.pth", "blip2_pretrained_flant5xxl.pth"):
        shutil.move(work / "weights" / name, cache)
    pairs = [{"caption": f"A picture, {i}.", "url": f"{web}/{i}.jpg"} for i in range(30)]
    for name in ("ccs", "laion"):
        (work / f"{name}_synthetic_filtered_large.json").write_text(json.dumps(pairs))
    write_align(work / "cc_sbu_align", records=4)

    programs = tmp_path / "bin"
    programs.mkdir()
    stand_in = Path(__file__).with_name("dataset") / "stand_in_downloader.py"
    for name, command in (("img2dataset", f"{sys.executable} {stand_in}"), ("python", sys.executable)):
        (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (programs / name).chmod(0o755)
    env = os.environ | {
        "WORK": str(work),
        "SIZES": sizes(),
        "SHELL_OF_TEST": shell,
        "DATA_ONLY": data_only,
        "PYTHONPATH": str(repository),
    }
    env |= {"PATH": f"{programs}:{os.environ['PATH']}", "TORCH_HOME": str(tmp_path / "torch"), "OMP_NUM_THREADS": "1"}
    env |= {"PROCESSES": "1", "THREADS": "4", "IMAGE_SIZE": "64"}
    done = subprocess.run([shell, ROOT / "tests/tutorial.sh"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    if data_only == "yes":
        assert (work / "laion/laion_dataset/00000.tar").exists() and (work / "cc_sbu/cc_sbu_dataset/00000.tar").exists()
        return
    for line in (
        f"cache_file_path: {cache}/eva_vit_g.pth",
        "Load 4 training prompts",
        "Loaded 4 records for train split from the dataset.",
        "Start training",
    ):
        assert line in done.stderr
    answers = [json.loads(line) for line in (work / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4 and all("caption" in answer for answer in answers)
    assert len(list((repository / "output").glob("*/*/checkpoint_0.pth"))) == 2
