"""Where weights come from."""

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from minigpt4.common import facts
from minigpt4.common.errors import ConfigError
from minigpt4.weights import locate
from minigpt4.weights.download import DownloadError


def test_a_url_is_fetched_once_under_its_published_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    source = tmp_path / "eva_vit_g.pth"
    source.write_bytes(bytes(1024))
    monkeypatch.setitem(facts.PUBLISHED_KIB, source.as_uri(), 1)
    fetched = locate.fetch(source.as_uri())
    assert fetched == tmp_path / "hub/checkpoints/eva_vit_g.pth"
    assert fetched.read_bytes() == bytes(1024)
    source.unlink()
    assert locate.fetch(source.as_uri()) == fetched


def test_files_of_one_name_do_not_meet(tmp_path, monkeypatch):
    """Two URLs, a query, and a hash tell files apart; a copy under torch hub's name is a published file's alone."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache/hub/checkpoints").mkdir(parents=True)
    (tmp_path / "cache/hub/checkpoints/checkpoint_0.pth").write_bytes(b"of an earlier version")
    for run in ("runA", "runB"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "checkpoint_0.pth").write_bytes(run.encode())
    urls = [(tmp_path / run / "checkpoint_0.pth").as_uri() for run in ("runA", "runB")]
    for url, content in [*zip(urls, (b"runA", b"runB"), strict=True), *zip(urls, (b"runA", b"runB"), strict=True)]:
        assert locate.fetch(url).read_bytes() == content
        assert locate.fetch(url).name == "checkpoint_0.pth"
    assert locate.cached_file("https://a/x.pth?v=1") != locate.cached_file("https://a/x.pth?v=2")
    mirror, published = "https://mirror/eva_vit_g.pth", facts.VIT_WEIGHTS["eva_clip_g"]
    assert locate.cached_file(mirror) != locate.cached_file(published)
    assert locate.cached_file(f"{published}#sha256={'0' * 64}") == locate.cached_file(published)


def test_a_path_is_taken_as_it_is(tmp_path):
    (tmp_path / "a.pth").touch()
    assert locate.fetch(str(tmp_path / "a.pth")) == tmp_path / "a.pth"
    with pytest.raises(FileNotFoundError, match="b.pth does not exist"):
        locate.fetch(str(tmp_path / "b.pth"))


def test_published_stands_for_the_named_encoders_weights():
    assert facts.vit_weights("eva_clip_g", "published").endswith("/eva_vit_g.pth")
    assert facts.vit_weights("eva_clip_g", None) is None
    assert facts.vit_weights({"depth": 2}, "mine.pth") == "mine.pth"
    with pytest.raises(ConfigError, match="vit_weights is required when model.vit_model is a mapping"):
        facts.vit_weights({"depth": 2}, "published")


def test_a_path_may_be_a_folder(tmp_path):
    assert locate.fetch(str(tmp_path)) == tmp_path


def test_the_cache_is_torchs_own(monkeypatch, tmp_path):
    """TORCH_HOME, XDG_CACHE_HOME, the default: files that torch or LAVIS has fetched are found."""
    for set_to in ({"TORCH_HOME": str(tmp_path / "t")}, {"XDG_CACHE_HOME": str(tmp_path / "x")}, {}):
        for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in set_to.items():
            monkeypatch.setenv(name, value)
        published = facts.VIT_WEIGHTS["eva_clip_g"]
        assert locate.cached_file(published) == Path(torch.hub.get_dir()) / "checkpoints/eva_vit_g.pth"


def test_a_hash_in_the_url(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.pth").write_bytes(b"weights")
    url = (tmp_path / "a.pth").as_uri()
    with pytest.raises(DownloadError, match="sha256 is 9a12"):
        locate.fetch(f"{url}#sha256={'0' * 64}")
    right = hashlib.sha256(b"weights").hexdigest()
    assert locate.fetch(f"{url}#sha256={right}").read_bytes() == b"weights"


def test_a_hash_is_checked_on_a_cached_file_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    right, wrong = (hashlib.sha256(content).hexdigest() for content in (b"weights", b"other"))
    url = facts.VIT_WEIGHTS["eva_clip_g"]
    path = locate.cached_file(url)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")  # by the user, or by an earlier run without a hash
    for _ in range(2):
        with pytest.raises(DownloadError, match=f"eva_vit_g.pth is not the file it should be: its sha256 is {right}"):
            locate.fetch(f"{url}#sha256={wrong}")
    assert path.read_bytes() == b"weights"
    locate.fetch(f"{url}#sha256={right}")
    hashed = []
    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "file_digest", lambda *args: hashed.append(args))
        assert locate.fetch(f"{url}#sha256={right.upper()}") == path and not hashed
    path.write_bytes(b"changed since")
    with pytest.raises(DownloadError, match="its sha256 is"):
        locate.fetch(f"{url}#sha256={right}")


def test_the_size_of_a_published_file_is_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.pth").write_bytes(b"a page of a captive portal")
    monkeypatch.setitem(facts.PUBLISHED_KIB, (tmp_path / "a.pth").as_uri(), 1000)
    with pytest.raises(DownloadError, match="is truncated, with 26 bytes instead of about 1,024,000"):
        locate.fetch((tmp_path / "a.pth").as_uri())
    assert not locate.cached_file((tmp_path / "a.pth").as_uri()).exists()


@pytest.mark.parametrize("value", ["1", "true", "YES"])
def test_offline(tmp_path, monkeypatch, value):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    url = facts.VIT_WEIGHTS["eva_clip_g"]
    with pytest.raises(DownloadError, match="not in the cache, and nothing may be fetched.*Put the file of https.* at"):
        locate.fetch(url)
    locate.cached_file(url).parent.mkdir(parents=True)
    locate.cached_file(url).write_bytes(b"fetched before")
    assert locate.fetch(url) == locate.cached_file(url)


def test_offline_is_a_flag_of_every_command(tmp_path, monkeypatch):
    from minigpt4.cli import caption, chat
    from minigpt4.common.config import Config

    parsers = [caption.parse_args, chat.parse_args, _script("train").parse_args, _script("demo").parse_args]
    for parse in parsers:
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        arguments = ["--cfg-path", str(ROOT / "eval_configs/minigpt4_tiny_eval.yaml")]
        images = ["a.png"] if parse in (caption.parse_args, chat.parse_args) else []
        Config(parse([*images, *arguments]))
        assert not facts.offline()
        Config(parse([*images, *arguments, "--offline"]))
        assert facts.offline()


def _script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_shards(tmp_path):
    assert locate.shards(tmp_path) == {}
    (tmp_path / "pytorch_model.bin").touch()
    assert locate.shards(tmp_path) == {"pytorch_model.bin": []}
    index = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors", "c": "x.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "x.safetensors").touch()
    assert locate.shards(tmp_path) == {"x.safetensors": ["a", "c"], "y.safetensors": ["b"]}
    assert locate.missing_shards(tmp_path) == ["y.safetensors"]
    (tmp_path / "model.safetensors.index.json").write_text("<html>")
    with pytest.raises(ConfigError, match="index.json is no index of shards"):
        locate.shards(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.pth", b"", "it is empty"),
        ("a.pth", b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS pointer.*git lfs pull"),
        ("a.pth", b"\n<!DOCTYPE html><html>", "it is a web page"),
        ("eva_vit_g.pth", b"PK\x03\x04" + bytes(1000), "it is truncated, with 1,004 bytes"),
    ],
)
def test_why_a_file_cannot_be_read(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    assert re.search(reason, locate.why_unreadable(tmp_path / name))


def test_nothing_is_said_of_other_files(tmp_path):
    (tmp_path / "a.pth").write_bytes(b"PK\x03\x04")
    assert locate.why_unreadable(tmp_path / "a.pth") is None


def test_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert facts.is_hub_id("lmsys/vicuna-7b-v1.5")
    for path in ("models/vicuna", "/abs/vicuna", "vicuna", "a/b/c", "../a"):
        assert not facts.is_hub_id(path)


def test_finding_weights_needs_no_torch():
    code = "import sys, minigpt4.weights.locate; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
