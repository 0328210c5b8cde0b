"""demo.py, without a browser."""

import os
import signal
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from helpers import ROOT, free_port

import demo


def test_the_whole_command(golden_config):
    """demo.py, in a process of its own, serves the page, loads the model of a YAML file, and ends on Ctrl-C."""
    port = free_port()
    command = [sys.executable, "demo.py", "--cfg-path", str(golden_config), "--port", str(port)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "The model is ready" in line:
            break
    output = "".join(lines)
    assert "The model is ready" in output, output
    assert output.index("Initializing Chat") < output.index("Loading LLAMA") < output.index("Initialization Finished")
    assert urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=10).status == 200
    process.send_signal(signal.SIGINT)
    process.wait(60)


@pytest.mark.slow
def test_proxies_are_not_asked_for_the_page():
    """Nor does one that httpx does not know stop the page. Afterwards the environment is as before."""
    code = """
import os, urllib.request
from minigpt4.web.server import serve

before = dict(os.environ)
with serve() as page:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    assert opener.open(page.blocks.local_url, timeout=10).status == 200
names = {name for name in before.keys() | os.environ.keys() if name.lower().endswith("_proxy")}
assert all(before.get(name) == os.environ.get(name) for name in names) and len(names) >= 4
"""
    proxies = {"http_proxy": "http://127.0.0.1:9", "HTTPS_PROXY": "127.0.0.1:9", "NO_PROXY": "example.org"}
    proxies["ALL_PROXY"] = "socks4://127.0.0.1:9"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | proxies, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


def test_a_wrong_path_is_reported_before_anything_is_served(tmp_path):
    (tmp_path / "eval.yaml").write_text("model:\n  arch: mini_gpt4\n  ckpt: /nowhere.pth\n")
    command = [sys.executable, "demo.py", "--cfg-path", str(tmp_path / "eval.yaml")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "model.ckpt = '/nowhere.pth'" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--auth", "alice"], "not of the form USER:PASSWORD"),
        (["--concurrency", "0"], "--concurrency 0 must be more than 0"),
        (["--max-upload-mb", "-1"], "--max-upload-mb -1.0 must be more than 0"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        demo.parse_args(["--cfg-path", "x", *arguments])
    assert message in capsys.readouterr().err


def test_defaults_are_local():
    args = demo.parse_args(["--cfg-path", "x"])
    assert (args.host, args.share, args.auth, args.gpu_id) == ("127.0.0.1", False, None, 0)
    assert demo.parse_args(["--cfg-path", "x", "--auth", "a:b", "c:d:e"]).auth == [("a", "b"), ("c", "d:e")]


def test_help_loads_no_heavy_library():
    code = "import sys, demo\ntry: demo.parse_args(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules or 'gradio' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_all_options_reach_the_page(golden_config, monkeypatch):
    seen = {}

    @contextmanager
    def serve(**options):
        seen.update(options)
        yield SimpleNamespace(blocks=SimpleNamespace(block_thread=lambda: None))

    monkeypatch.setattr(demo, "serve", serve)
    monkeypatch.setattr(
        demo, "load_model", lambda page, cfg, gpu_id, check_weights: seen.update(cfg=cfg, gpu_id=gpu_id)
    )
    port = free_port()
    options = ["--host", "0.0.0.0", "--port", str(port), "--share", "--auth", "a:b", "--concurrency", "3"]
    demo.main(["--cfg-path", str(golden_config), "--gpu-id", "1", "--max-upload-mb", "0.5", *options])
    assert seen.pop("cfg").model_cfg.arch == "mini_gpt4"
    assert seen == {
        "host": "0.0.0.0", "port": port, "share": True, "auth": [("a", "b")], "concurrency": 3, "max_upload_mb": 0.5,
        "emoji": False, "gpu_id": 1,
    }  # fmt: skip
