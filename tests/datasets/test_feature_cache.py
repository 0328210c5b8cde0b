"""Caches of image features: written whole, read back as they were, refused where they do not fit."""

import io
import json
import pickle
from itertools import islice

import numpy as np
import pytest
import torch

from minigpt4.common import facts
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.datasets import feature_cache
from minigpt4.datasets.datasets.feature_dataset import FeatureSet, FeatureStream
from minigpt4.datasets.loaders import TrainLoader
from minigpt4.datasets.splits import Share
from minigpt4.weights import locate

SHAPE = [4, 6]
MANIFEST = {"made_by": {"model": {"image_size": 28}}, "shape": SHAPE, "parts": 2}


def features(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float16)


def write_cache(folder, samples: int = 5, **manifest):
    """A cache of two shards; captions "Caption <i>!", ids "<i>.x"."""
    feature_cache.open_cache(folder, MANIFEST | manifest)
    for number in range(2):
        first = number * samples
        content = [
            (f"k{i}", features(i), {"caption": f"Caption {i}!", "image_id": f"{i}.x"})
            for i in range(first, first + samples)
        ]
        assert feature_cache.write_shard(feature_cache.shard_path(folder, number), content) == samples
    return folder


def test_a_set_gives_back_what_was_written(tmp_path):
    dataset = FeatureSet(str(write_cache(tmp_path / "cache")))
    assert len(dataset) == 10
    for i in (0, 4, 5, 9, -1):
        sample = dataset[i]
        assert torch.equal(sample["image_features"], torch.from_numpy(features(i % 10)))
        assert sample["image_features"].dtype == torch.float16
        assert (sample["text_input"], sample["image_id"]) == (f"Caption {i % 10}!", f"{i % 10}.x")
    with pytest.raises(IndexError):
        dataset[10]


def test_a_cache_of_an_earlier_version_cannot_draw_a_share(tmp_path):
    folder = str(write_cache(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"datasets\.laion\.build_info\.val=0\.1: .*earlier version"):
        FeatureStream(folder, str.lower, "laion", Share(0.1, is_val=False))
    feature_cache.open_cache(folder, MANIFEST | {feature_cache.IDENTITIES: True})  # it can be continued as it is
    assert feature_cache.IDENTITIES not in feature_cache.read_manifest(folder)


def test_a_stream_gives_back_what_was_written(tmp_path):
    stream = FeatureStream(str(write_cache(tmp_path / "cache")), str.lower)
    seen = list(islice(stream, 60))
    assert {sample["image_id"] for sample in seen} == {f"{i}.x" for i in range(10)}
    for sample in seen:
        number = int(sample["image_id"].split(".")[0])
        assert torch.equal(sample["image_features"], torch.from_numpy(features(number)))
        assert sample["text_input"] == f"caption {number}!"


@pytest.mark.parametrize("name", ["laion", "cc_sbu", "cc_sbu_align"])
def test_builders_read_caches_in_the_place_of_pictures(tmp_path, name):
    folder = str(write_cache(tmp_path / "cache"))
    section = {"build_info": {"features": folder}, "text_processor": {"train": {"name": "blip_caption"}}}
    from omegaconf import OmegaConf

    cls = registry.get_builder_class(name)
    assert cls.from_features(OmegaConf.create(section)) and not cls.from_features({"build_info": {"storage": "x"}})
    dataset = cls(OmegaConf.create(section)).build_datasets()["train"]
    (batch,) = TrainLoader({name: dataset}, None, batch_size=3, num_workers=0, seed=1).epoch(0, 1)
    assert batch["image_features"].shape == (3, *SHAPE) and batch["image_features"].dtype == torch.float16
    expected = "Caption" if name == "cc_sbu_align" else "caption"
    assert all(text.startswith(expected) for text in batch["text_input"])


def test_a_cache_is_continued_only_if_it_is_the_same(tmp_path):
    feature_cache.open_cache(tmp_path / "c", MANIFEST)
    feature_cache.open_cache(tmp_path / "c", MANIFEST)
    with pytest.raises(ConfigError, match=r"made_by.model.image_size: 28 in the cache, 56 here"):
        feature_cache.open_cache(tmp_path / "c", MANIFEST | {"made_by": {"model": {"image_size": 56}}})
    with pytest.raises(ConfigError, match="parts: 2 in the cache, 3 here"):
        feature_cache.open_cache(tmp_path / "c", MANIFEST | {"parts": 3})


@pytest.mark.parametrize("content", [None, "", "{", "[]", '"text"', '{"made_by": {}}'])
def test_a_folder_that_is_no_cache(tmp_path, content):
    if content is not None:
        (tmp_path / "cache.json").write_text(content)
    for cls in (FeatureSet, lambda folder: FeatureStream(folder, str)):
        with pytest.raises(ConfigError, match="cache.json is not the manifest of a feature cache"):
            cls(str(tmp_path))


def test_an_incomplete_cache(tmp_path):
    folder = write_cache(tmp_path / "cache")
    (folder / "00001.tar").unlink()
    for cls in (FeatureSet, lambda folder: FeatureStream(folder, str)):
        with pytest.raises(ConfigError, match=r"not complete: 1 of 2 shards are missing, e.g. 00001.tar"):
            cls(str(folder))


def test_an_interrupted_shard_leaves_nothing(tmp_path):
    def broken():
        yield "a", features(0), {"caption": "c", "image_id": "i"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        feature_cache.write_shard(tmp_path / "00000.tar", broken())
    assert list(tmp_path.iterdir()) == []


def test_shards_are_the_same_bytes_each_time(tmp_path):
    first, second = (write_cache(tmp_path / name) / "00000.tar" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [b"", b"no array", npy(features(0))[:-3], npy(features(0)[:2]), npy(features(0).astype(np.float32))],
    ids=["empty", "text", "cut", "shape", "float32"],
)
def test_broken_features(tmp_path, content, caplog):
    """A stream leaves them out and counts them; a set names the shard to make again."""
    folder = write_cache(tmp_path / "cache")
    import webdataset as wds

    with wds.TarWriter(str(folder / "00000.tar")) as tar:
        tar.write({"__key__": "k", "npy": content, "json": b'{"caption": "c", "image_id": "bad"}'})
    with pytest.raises(ConfigError, match=r"00000.tar is broken .* run the same cache-features command again"):
        FeatureSet(str(folder))[0]
    stream = FeatureStream(str(folder), str)
    assert "bad" not in {sample["image_id"] for sample in islice(stream, 30)}
    assert stream.decoded.left_out["features that are broken"] > 0
    assert "features that are broken" in caplog.text


def test_captions_that_cannot_be_used_are_left_out(tmp_path, caplog):
    """A cache may be older than the rule."""
    folder = write_cache(tmp_path / "cache")
    captions = ["", "fine", "\ud83d", "\ufeff "]
    content = [(f"k{i}", features(i), {"caption": text, "image_id": f"{i}"}) for i, text in enumerate(captions)]
    feature_cache.write_shard(folder / "00000.tar", content)
    dataset = FeatureSet(str(folder))
    assert [dataset[i]["text_input"] for i in range(2)] == ["fine", "Caption 5!"] and len(dataset) == 6
    assert "left out 3 records whose captions cannot be used" in caplog.text
    stream = FeatureStream(str(folder), str)
    assert {sample["image_id"] for sample in islice(stream, 40)} == {"1", *(f"{i}.x" for i in range(5, 10))}
    assert stream.read.left_out["an empty caption"] > 0


def test_workers_get_their_own_copy(tmp_path):
    """Python 3.14 starts workers by forkserver, and macOS by spawn."""
    folder = str(write_cache(tmp_path / "cache"))
    assert pickle.loads(pickle.dumps(FeatureSet(folder)))[0]["image_id"] == "0.x"
    assert next(iter(pickle.loads(pickle.dumps(FeatureStream(folder, str)))))["text_input"]


def test_a_shard_out_of_reach_is_waited_for(tmp_path, monkeypatch):
    folder = write_cache(tmp_path / "cache")
    dataset = FeatureSet(str(folder))
    dataset.patience.timeout_s = 30
    away = folder.rename(tmp_path / "away")
    monkeypatch.setattr("minigpt4.datasets.patience.time.sleep", lambda seconds: away.exists() and away.rename(folder))
    assert dataset[0]["image_id"] == "0.x"
    assert dataset.take_left_out().total() == 1


def test_a_shard_that_is_no_tar(tmp_path):
    folder = write_cache(tmp_path / "cache")
    (folder / "00001.tar").write_bytes(b"nothing" * 300)
    with pytest.raises(ConfigError, match="00001.tar is broken"):
        FeatureSet(str(folder))


def test_weights_files_are_identified_by_content(tmp_path, monkeypatch):
    monkeypatch.setattr(locate, "BLOCK", 1 << 12)
    content = bytes(range(256)) * 1200  # more than 64 blocks: only these are read
    for name, flip in (("a.pth", None), ("b.pth", None), ("c.pth", 0), ("d.pth", len(content) - 1)):
        changed = bytearray(content)
        if flip is not None:
            changed[flip] ^= 1
        (tmp_path / name).write_bytes(changed)
    a, b, c, d = (locate.identity(str(tmp_path / f"{name}.pth")) for name in "abcd")
    assert a["sha256"] == b["sha256"] and len({i["sha256"] for i in (a, c, d)}) == 3
    feature_cache.check_same({"w": a}, {"w": b}, "x")  # another name, the same weights
    with pytest.raises(ConfigError, match="w: a.pth in the cache, c.pth here, which differ in sha256"):
        feature_cache.check_same({"w": a}, {"w": c}, "x")


def test_weights_that_are_not_here_are_identified_by_name(tmp_path, monkeypatch):
    """Training from a cache needs no encoder: its published weights are not downloaded to compare them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    away = locate.identity(facts.VIT_WEIGHTS["eva_clip_g"])
    assert away == {"file": "eva_vit_g.pth"}
    (tmp_path / "eva_vit_g.pth").write_bytes(b"weights")
    here = locate.identity(str(tmp_path / "eva_vit_g.pth"))
    feature_cache.check_same({"w": here}, {"w": away}, "x")
    with pytest.raises(ConfigError, match="w: eva_vit_g.pth in the cache, other.pth here, which differ in file"):
        feature_cache.check_same({"w": here}, {"w": {"file": "other.pth"}}, "x")
    one, other = (locate.identity(f"https://host/{run}/vit.pth") for run in ("runA", "runB"))
    with pytest.raises(ConfigError, match="which differ in url"):
        feature_cache.check_same({"w": one | {"sha256": "0"}}, {"w": other}, "x")
    feature_cache.check_same({"w": one | {"sha256": "0"}}, {"w": one}, "x")


def test_the_manifest_is_json_that_a_person_can_read(tmp_path):
    folder = write_cache(tmp_path / "cache")
    assert json.loads((folder / "cache.json").read_text()) == MANIFEST == feature_cache.read_manifest(folder)
