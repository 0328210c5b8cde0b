"""Where weights come from."""

from pathlib import Path

import pytest
import torch

from minigpt4.common import weights
from minigpt4.common.errors import ConfigError


def test_a_url_is_fetched_once_under_its_published_name(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert weights.cached_file("http://a/b.pth").parent == Path(torch.hub.get_dir()) / "checkpoints"
    source = tmp_path / "eva_vit_g.pth"
    source.write_bytes(b"weights")
    fetched = weights.fetch(source.as_uri())
    assert fetched == tmp_path / "hub/checkpoints/eva_vit_g.pth"
    assert fetched.read_bytes() == b"weights"
    source.unlink()
    assert weights.fetch(source.as_uri()) == fetched


def test_a_path_is_taken_as_it_is(tmp_path):
    (tmp_path / "a.pth").touch()
    assert weights.fetch(str(tmp_path / "a.pth")) == tmp_path / "a.pth"
    with pytest.raises(FileNotFoundError, match="b.pth does not exist"):
        weights.fetch(str(tmp_path / "b.pth"))


def test_published_stands_for_the_named_encoders_weights():
    assert weights.vit_weights("eva_clip_g", "published").endswith("/eva_vit_g.pth")
    assert weights.vit_weights("eva_clip_g", None) is None
    assert weights.vit_weights({"depth": 2}, "mine.pth") == "mine.pth"
    with pytest.raises(ConfigError, match="vit_weights is required when model.vit_model is a mapping"):
        weights.vit_weights({"depth": 2}, "published")
