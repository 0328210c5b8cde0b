"""All steps of stage 1's data: JSON → TSV → pictures from a web server on this machine → shards → training steps.

They run with a stand-in that takes the flags of img2dataset and writes its format; and with img2dataset itself, if
`IMG2DATASET` names it (`make rehearsal`).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from dataset_files import picture_bytes
from helpers import ROOT

from train import main as train

COUNT, PER_SHARD = 60, 12
CAPTIONS = ['a "quoted"\ttab', "two\nlines of\r\ntext", "é 日本 😀", "a plain caption"]
BROKEN = {"missing": 404, "broken": 200, "empty": 200, "forbidden": 403}


class Pictures(BaseHTTPRequestHandler):
    """Serves /<kind>/<number>.jpg."""

    def do_GET(self):
        _, kind, name = self.path.split("/")
        self.send_response(BROKEN.get(kind, 200))
        self.end_headers()
        if kind == "slow":
            time.sleep(0.3)
        if kind in ("good", "slow"):
            self.wfile.write(picture_bytes(int(name.split(".")[0]), size=70, format="JPEG"))
        elif kind == "broken":
            self.wfile.write(picture_bytes(0, size=70, format="JPEG")[:100])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def web():
    """The address of the server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(
    params=["stand-in", pytest.param("img2dataset", marks=[pytest.mark.slow, pytest.mark.timeout(600)])],
)
def downloader(request, tmp_path):
    """The path of the program that download_*.sh run."""
    if request.param == "img2dataset":
        program = shutil.which(os.environ.get("IMG2DATASET", "img2dataset"))
        if not program:
            pytest.skip("img2dataset is in an environment of its own: `make rehearsal`, or set IMG2DATASET")
        return os.path.abspath(program)
    program = tmp_path / "stand-in"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("stand_in_downloader.py")} "$@"\n')
    program.chmod(0o755)
    return str(program)


def command(*arguments, folder, **environment):
    done = subprocess.run(
        arguments, cwd=folder, env=os.environ | environment, capture_output=True, text=True, errors="replace"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def write_list(folder, web) -> dict[str, str]:
    """Write a list like BLIP's in which four of ten links are dead. Returns {good link: caption}."""
    kinds = ["good"] * 5 + ["slow"] + list(BROKEN)
    pairs = []
    for i in range(COUNT):
        kind = kinds[i % len(kinds)]
        pairs.append({"caption": f"{CAPTIONS[i % len(CAPTIONS)]} {i}", "url": f"{web}/{kind}/{i}.jpg"})
    (folder / "ccs_synthetic_filtered_large.json").write_text(json.dumps(pairs))
    return {pair["url"]: pair["caption"] for pair in pairs if re.search("/(good|slow)/", pair["url"])}


def read_shards(folder) -> dict[str, str]:
    """{link: caption} of the shards."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            contents = {member.name: tar.extractfile(member).read() for member in tar}
        for name, content in contents.items():
            if name.endswith(".json"):
                about = json.loads(content)
                assert name.replace(".json", ".jpg") in contents
                found[about["url"]] = about["caption"]
    return found


def break_a_picture(path):
    """Overwrite the head of a shard's first picture."""
    with tarfile.open(path) as tar:
        start = next((member.offset_data for member in tar if member.name.endswith(".jpg")), None)
    if start is not None:  # all links of a shard may be dead
        content = bytearray(path.read_bytes())
        content[start : start + 100] = bytes(100)
        path.write_bytes(content)


def test_from_the_list_to_training(tmp_path, web, downloader, caplog):
    """With the scripts where readers of tutorials put them: beside the data."""
    good = write_list(tmp_path, web)
    for name in ("convert_cc_sbu.py", "download_cc_sbu.sh"):
        shutil.copy(ROOT / "dataset" / name, tmp_path)
    command(sys.executable, "convert_cc_sbu.py", "--rows-per-file", "25", folder=tmp_path)
    command(
        *("sh", "download_cc_sbu.sh", "--number_sample_per_shard", str(PER_SHARD)),
        *("--timeout", "10"),
        folder=tmp_path,
        IMG2DATASET=downloader,
        PROCESSES="1",
        THREADS="8",
        IMAGE_SIZE="64",
    )
    shards = sorted((tmp_path / "cc_sbu_dataset").glob("*.tar"))
    assert len(shards) > 3
    assert read_shards(tmp_path / "cc_sbu_dataset") == good

    for shard in shards:
        break_a_picture(shard)
    storage = f"{tmp_path}/cc_sbu_dataset/*.tar"
    options = [f"datasets.{name}.build_info.storage={storage}" for name in ("laion", "cc_sbu")]
    options += ["run.batch_size_train=4", "run.iters_per_epoch=4", "run.max_epoch=2", "run.num_workers=1"]
    options += [f"run.output_dir={tmp_path}/output", "run.log_freq=1", "run.warmup_steps=1"]
    caplog.set_level("INFO")
    config = ROOT / "train_configs/minigpt4_tiny_stage1_pretrain.yaml"
    train(["--cfg-path", str(config), "--options", *options])
    assert list((tmp_path / "output").glob("*/checkpoint_1.pth"))
    for epoch in (0, 1):
        said = [r.getMessage() for r in caplog.records if r.getMessage().startswith(f"Epoch {epoch}: ")]
        report = next(line for line in said if "an image that is not one, or is broken" in line)
        assert re.search(r"Epoch \d: (laion|cc_sbu): left out \d+ × an image", report)
        assert any(f"{shard} (" in report for shard in shards)


@pytest.fixture(params=["sh", "bash", "dash"])
def shell(request):
    if not shutil.which(request.param):
        pytest.skip(f"needs {request.param}")
    return request.param


@pytest.mark.parametrize(
    ("suffix", "names"),
    [
        (
            "convert_{}.py",
            {"ccs_synthetic": "laion_synthetic", "CC3M + CC12M + SBU to a TSV": "LAION (115 million pairs) to TSVs"},
        ),
        ("download_{}.sh", {"ccs_synthetic": "laion_synthetic", "CC3M + CC12M + SBU": "LAION"}),
    ],
)
def test_the_scripts_of_both_lists_are_the_same(suffix, names):
    one, other = ((ROOT / "dataset" / suffix.format(name)).read_text() for name in ("cc_sbu", "laion"))
    for name, another in (names | {"_cc_sbu.": "_laion.", "cc_sbu_dataset": "laion_dataset"}).items():
        one = one.replace(name, another)
    assert one == other.replace("_cc_sbu.", "_laion.")


@pytest.mark.parametrize("name", ["cc_sbu", "laion"])
def test_each_script_works_alone(tmp_path, name, shell):
    """Copied to a folder with a blank in its name, and called by a path or from within it, without this repository."""
    stem = {"cc_sbu": "ccs", "laion": "laion"}[name] + "_synthetic_filtered_large"
    folder = tmp_path / "my data"
    folder.mkdir()
    for script in (f"convert_{name}.py", f"download_{name}.sh"):
        shutil.copy(ROOT / "dataset" / script, folder)
    (folder / f"{stem}.json").write_text('[{"caption": "A cat.", "url": "http://example.org/1.jpg"}]')
    command(sys.executable, "-I", f"convert_{name}.py", folder=folder)
    assert (folder / f"{stem}.tsv").read_text() == "caption\turl\nA cat.\thttp://example.org/1.jpg\n"
    for place, script in ((folder, f"download_{name}.sh"), (tmp_path, f"my data/download_{name}.sh")):
        said = command(shell, script, folder=place, IMG2DATASET="echo", URL_LIST=str(folder / f"{stem}.tsv"))
        assert said.stdout.startswith(f"--url_list {folder}/{stem}.tsv ") and not said.stderr


def test_a_tsv_is_not_overwritten(tmp_path):
    (tmp_path / "list.json").write_text('[{"caption": "A cat.", "url": "http://example.org/1.jpg"}]')
    for target in ("list.json", "list.tsv"):
        (tmp_path / "list.tsv").write_text("of the user")
        before = (tmp_path / target).read_text()
        arguments = [ROOT / "dataset/convert_laion.py", "--input", "list.json", "--output", target]
        done = subprocess.run([sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and f"Error: {target} exists already. Move it away" in done.stderr
        assert (tmp_path / target).read_text() == before


def test_shards_of_others_are_not_overwritten(tmp_path, shell):
    """img2dataset writes 00000.tar anew unless there is a 00000_stats.json; an interrupted run leaves _tmp/."""
    (tmp_path / "list.tsv").write_text("caption\turl\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "00000.tar").write_text("of the user")
    env = os.environ | {"IMG2DATASET": "echo", "URL_LIST": "list.tsv", "OUTPUT_FOLDER": "out"}
    run = [shell, ROOT / "dataset/download_laion.sh"]
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "Error: out has shards that img2dataset did not write" in done.stderr
    for name in ("_tmp", "00001_stats.json"):
        (tmp_path / "out" / name).mkdir()
        assert subprocess.run(run, cwd=tmp_path, env=env).returncode == 0
        (tmp_path / "out" / name).rmdir()


@pytest.mark.parametrize(
    ("program", "message"),
    [("/no/such", "pipx install img2dataset"), ("true", "there is no laion_synthetic_filtered_large.tsv")],
)
def test_without_img2dataset_or_without_a_list(tmp_path, program, message, shell):
    script, env = ROOT / "dataset/download_laion.sh", os.environ | {"IMG2DATASET": program}
    done = subprocess.run([shell, script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.parametrize("name", ["cc_sbu", "laion"])
def test_the_settings_of_the_first_release(tmp_path, name, shell):
    stem = {"cc_sbu": "ccs", "laion": "laion"}[name] + "_synthetic_filtered_large"
    (tmp_path / f"{stem}.tsv").write_text("caption\turl\n")
    script = f"{ROOT}/dataset/download_{name}.sh"
    said = command(shell, script, "--retries", "2", folder=tmp_path, IMG2DATASET="echo").stdout.strip()
    assert said == (
        f"--url_list {stem}.tsv --input_format tsv --url_col url --caption_col caption --output_format webdataset "
        f"--output_folder {name}_dataset --processes_count 16 --thread_count 128 --image_size 256 "
        "--enable_wandb False --distributor multiprocessing --retries 2"
    )
    changed = dict(PROCESSES="2", THREADS="4", IMAGE_SIZE="512", WANDB="True", DISTRIBUTOR="ray", OUTPUT_FOLDER="/x")
    said = command(shell, script, folder=tmp_path, IMG2DATASET="echo", **changed).stdout
    for part in ("processes_count 2", "thread_count 4", "image_size 512", "wandb True", "distributor ray", "folder /x"):
        assert part in said
