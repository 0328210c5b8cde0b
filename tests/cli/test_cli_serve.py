"""python -m minigpt4 serve, as a user runs it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from helpers import ROOT, free_port

import demo
from minigpt4.cli.arguments import given
from minigpt4.cli.serve import keys_of, main, parse_args
from minigpt4.common.errors import ConfigError
from minigpt4.serving.settings import Settings

TINY = "eval_configs/minigpt4_tiny_eval.yaml"


def start(*arguments, **variables):
    command = [sys.executable, "-m", "minigpt4", "serve", *arguments]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **variables}
    )


def wait_for(process, port, *expected):
    """Wait until /health reports one of these. Returns all reports so far."""
    statuses = []
    for _ in range(600):
        time.sleep(0.1)
        assert process.poll() is None, process.stdout.read()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
                statuses.append(json.load(response)["status"])
        except urllib.error.HTTPError as error:
            statuses.append(json.load(error)["status"])
        except urllib.error.URLError:
            continue
        if statuses[-1] in expected:
            return statuses
    raise AssertionError(statuses)


def end(process):
    """Press Ctrl-C. Returns the output."""
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    return output


def test_start_ask_and_ctrl_c():
    port = free_port()
    process = start("--cfg-path", TINY, "--port", str(port), MINIGPT4_API_KEY="secret")
    try:
        assert set(wait_for(process, port, "ready")[:-1]) <= {"loading"}
        body = {"model": "minigpt4", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json", "Authorization": "Bearer secret"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response)["choices"][0]["finish_reason"] in ("stop", "length")
        assert "secret" not in end(process)
    finally:
        process.kill()


SLOW = """
import time
from minigpt4.conversation import loading

def load_chat(cfg, device):
    import torch
    end = time.time() + 60
    while time.time() < end:
        (torch.rand(500, 500) @ torch.rand(500, 500)).sum().item()

loading.load_chat = load_chat
"""


def test_ctrl_c_while_the_model_is_loading(tmp_path):
    (tmp_path / "slow_model.py").write_text(SLOW)
    port, path = free_port(), os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = start("--cfg-path", TINY, "--port", str(port), "--import", "slow_model", PYTHONPATH=path)
    try:
        wait_for(process, port, "loading")
        end(process)
    finally:
        process.kill()


def test_weights_that_do_not_fit_end_it(tmp_path):
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"llama_proj.weight": zeros(5120, 768), "llama_proj.bias": zeros(5120)}, tmp_path / "other.safetensors")
    arguments = ["--cfg-path", str(ROOT / TINY), "--port", str(free_port())]
    with pytest.raises(ConfigError, match="5120"):
        main([*arguments, "--options", f"model.ckpt={tmp_path / 'other.safetensors'}"])


def test_an_address_that_cannot_be_used():
    arguments = ["--cfg-path", str(ROOT / TINY)]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for command in (main, demo.main):
            with pytest.raises(ConfigError, match=f"--host 127.0.0.1 and --port {port}: Address already in use"):
                command([*arguments, "--port", str(port)])
    with pytest.raises(ConfigError, match="--host no.such.host.invalid .*127.0.0.1 is this machine"):
        main([*arguments, "--host", "no.such.host.invalid"])
    with pytest.raises(ConfigError, match="--host 192.0.2.1 and --port 8000: Cannot assign"):  # no machine has it
        main([*arguments, "--host", "192.0.2.1"])
    with pytest.raises(ConfigError, match="--port 65536 must be from 0 to 65535"):
        main([*arguments, "--port", "65536"])


def test_wrong_arguments(capsys):
    for arguments, message in {
        ("--max-queue", "0"): "max_queue=0 must be more than 0",
        ("--timeout", "-1"): "timeout=-1.0 must be more than 0",
        ("--max-upload-mb", "nan"): "max_upload_mb=nan must be a finite number",
        ("--api-key", ""): "is empty",
        ("--port", "x"): "--port: invalid int value: 'x'",
    }.items():
        with pytest.raises(SystemExit):
            parse_args(["--cfg-path", "x", *arguments])
        assert message in capsys.readouterr().err


def test_every_setting_is_a_flag(monkeypatch):
    monkeypatch.delenv("MINIGPT4_API_KEY", raising=False)
    args = parse_args(["--cfg-path", "x"])
    assert Settings(**given(args, Settings)) == Settings()
    assert (args.host, args.port, keys_of(args)) == ("127.0.0.1", 8000, [])
    assert not (args.allow_http_images or args.allow_private_hosts)


def test_keys_need_not_be_in_the_list_of_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIGPT4_API_KEY", "a b")
    (tmp_path / "keys").write_text("c\n\nd\n")
    arguments = ["--cfg-path", "x", "--api-key-file", str(tmp_path / "keys"), "--api-key", "e"]
    assert sorted(keys_of(parse_args(arguments))) == ["a", "b", "c", "d", "e"]
    for wrong, message in ((["--open"], "--open"), (["--api-key-file", "none"], "none")):
        with pytest.raises(ConfigError, match=message):
            keys_of(parse_args(["--cfg-path", "x", *wrong]))


@pytest.mark.parametrize(("flags", "made"), [([], True), (["--open"], False), (["--api-key", "k"], False)])
def test_a_server_that_others_reach_has_a_key(monkeypatch, caplog, flags, made):
    seen = []
    monkeypatch.delenv("MINIGPT4_API_KEY", raising=False)
    monkeypatch.setattr("minigpt4.serving.app.create_app", lambda batcher, settings: seen.append(settings))
    monkeypatch.setattr("uvicorn.Server.run", lambda server: None)
    monkeypatch.setattr("uvicorn.Config.load", lambda config: None)
    main(["--cfg-path", str(ROOT / TINY), "--host", "0.0.0.0", "--port", str(free_port()), *flags])
    keys = seen[0].api_keys
    assert (len(keys) == 1 and len(keys[0]) > 15 and keys[0] in caplog.text) == made
    assert made or keys == (["k"] if "k" in flags else [])
