"""demo.py, without a browser."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import httpx
import pytest
from helpers import ROOT, free_port
from load_page import BYTES

import demo
from minigpt4.common.errors import ConfigError


def test_the_whole_command(golden_config, tmp_path):
    """demo.py, in a process of its own, serves the page, loads the model of a YAML file, and ends on SIGTERM.

    Reached by the network, it makes and prints a password. It leaves no file behind.
    """
    port = free_port()
    command = [sys.executable, "demo.py", "--cfg-path", str(golden_config), "--port", str(port), "--host", "0.0.0.0"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "The model is ready" in line:
                break
        output = "".join(lines)
        assert "The model is ready" in output, output
        assert (
            output.index("Initializing Chat") < output.index("Loading LLAMA") < output.index("Initialization Finished")
        )
        url, account = f"http://127.0.0.1:{port}/", re.search(r"User: (\S+)  Password: (\S{12,})", output).groups()
        assert [
            httpx.get(url, auth=auth, timeout=60).status_code for auth in (None, ("minigpt4", "guess"), account)
        ] == [
            401,
            401,
            200,
        ]
        assert httpx.get(url, timeout=60, headers={"Accept-Language": "zh"}).headers["content-language"] == "zh"
        assert httpx.get(f"{url}health", timeout=60).json()["status"] == "ready"
        video = {"params": {"name": "clip.mp4"}, "content": b"\0\0\0\x20ftyp" + bytes(2000), "headers": BYTES}
        assert httpx.post(f"{url}pictures", auth=account, timeout=60, **video).status_code == 400
        assert len(list(tmp_path.glob("minigpt4-videos-*"))) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert not list(tmp_path.glob("minigpt4-videos-*"))
    finally:
        process.kill()


@pytest.mark.slow
def test_proxies_are_not_asked_for_the_page():
    """Nor does one that httpx does not know stop the page. Afterwards the environment is as before."""
    code = """
import os, urllib.request
from minigpt4.web.server import serve

before = dict(os.environ)
with serve() as page:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    assert opener.open(page.url, timeout=10).status == 200
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


def test_defaults_are_local(monkeypatch):
    args = demo.parse_args(["--cfg-path", "x"])
    assert (args.host, args.port, args.share, args.auth, args.gpu_id) == ("127.0.0.1", None, False, None, 0)
    assert demo.parse_args(["--cfg-path", "x", "--auth", "a:b", "c:d:e"]).auth == [("a", "b"), ("c", "d:e")]
    variables = {"SERVER_NAME": "0.0.0.0", "SERVER_PORT": "7999", "SHARE": "True", "ROOT_PATH": "/chat"}  # gradio's
    for name, value in variables.items():
        monkeypatch.setenv(f"GRADIO_{name}", value)
    args = demo.parse_args(["--cfg-path", "x"])
    assert (args.host, args.port, args.share, args.root_path) == ("0.0.0.0", 7999, True, "/chat")


def test_passwords_need_not_be_in_the_list_of_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT4_AUTH", "ann:1 bob:2")
    (tmp_path / "file").write_text("cyd:3:4\n")
    arguments = ["--cfg-path", "x", "--auth-file", str(tmp_path / "file"), "--auth", "dan:5"]
    expected = [("dan", "5"), ("ann", "1"), ("bob", "2"), ("cyd", "3:4")]
    assert demo.accounts_of(demo.parse_args(arguments)) == expected
    with pytest.raises(ConfigError, match="--open"):
        demo.accounts_of(demo.parse_args([*arguments, "--open"]))
    monkeypatch.setenv("MINIGPT4_AUTH", "secret")
    with pytest.raises(ConfigError, match="MINIGPT4_AUTH") as error:
        demo.accounts_of(demo.parse_args(arguments))
    assert "secret" not in str(error.value)


def test_help_loads_no_heavy_library():
    code = "import sys, demo\ntry: demo.parse_args(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules or 'gradio' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("options", "auth"),
    [
        (["--host", "0.0.0.0", "--share", "--auth", "a:b", "--concurrency", "3"], [("a", "b")]),
        (["--host", "0.0.0.0", "--open"], None),
        (["--share"], "made"),
        ([], None),
    ],
)
def test_all_options_reach_the_page(golden_config, tmp_path, monkeypatch, options, auth):
    seen = {}

    @contextmanager
    def serve(**options):
        seen.update(options)
        yield
        raise AssertionError

    def load_model(page, cfg, gpu_id, check_weights):
        seen.update(cfg=cfg, gpu_id=gpu_id)
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "serve", serve)
    monkeypatch.setattr(demo, "load_model", load_model)
    monkeypatch.setattr(demo.signal, "signal", lambda number, handler: None)
    options += ["--port", str(free_port()), "--max-upload-mb", "0.5", "--feedback", str(tmp_path / "x.jsonl")]
    demo.main(["--cfg-path", str(golden_config), "--gpu-id", "1", "--allow-host", "a.b", *options])
    assert seen.pop("cfg").model_cfg.arch == "mini_gpt4"
    given = seen.pop("auth")
    if auth == "made":
        ((user, password),) = given
        assert user and len(password) >= 12
    else:
        assert given == auth
    assert seen == {
        "host": "0.0.0.0" if "--host" in options else "127.0.0.1", "port": int(options[options.index("--port") + 1]),
        "share": "--share" in options, "concurrency": 3 if "--concurrency" in options else 8, "max_upload_mb": 0.5,
        "emoji": False, "gpu_id": 1, "allow_host": ["a.b"], "root_path": "", "feedback": str(tmp_path / "x.jsonl"),
    }  # fmt: skip


def test_a_file_for_feedback_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=f"--feedback {tmp_path} cannot be written"):
        demo.check_feedback(str(tmp_path))
