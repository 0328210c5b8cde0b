"""The stream of shards: determinism, mixing, and everything that may be wrong with shards."""

import json
import logging
import os
import re
import tarfile
from collections import Counter
from itertools import islice

import pytest
from dataset_files import good_members, picture_bytes, write_shards, write_tar
from PIL import Image
from torch.utils.data import DataLoader

from minigpt4.common.errors import ConfigError
from minigpt4.datasets.datasets.image_text_stream import ImageTextStream
from minigpt4.datasets.datasets.shards import expand_shards
from minigpt4.processors import BaseProcessor, BlipCaptionProcessor


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def stream(storage, seed=0, epoch=0, rank=0, **kwargs) -> ImageTextStream:
    dataset = ImageTextStream(
        storage, BaseProcessor(), BaseProcessor(), name="laion", **{"shuffle_buffer": 50, **kwargs}
    )
    dataset.set_seed(seed, rank)
    dataset.set_epoch(epoch)
    return dataset


def ids(dataset, count=100) -> list[str]:
    return [sample["image_id"] for sample in islice(dataset, count)]


# --- what comes out


def test_samples_are_processed(shards):
    vis, text = (lambda image: image.size), BlipCaptionProcessor(prompt="a ")
    sample = next(iter(ImageTextStream(f"{shards}/*.tar", vis, text)))
    number = int(sample["image_id"].split("/")[1])
    assert sample == {"image": (20, 20), "text_input": f"a sample {number}", "image_id": sample["image_id"]}
    assert sample["image_id"] == f"{number // 30:05d}.tar/{number:09d}"


@pytest.mark.parametrize(("method", "called"), [("load", "image_fields"), ("text_of", "processed_text")])
def test_a_plug_in_that_overrides_what_training_does_not_call_is_told(shards, method, called):
    own = type("Own", (ImageTextStream,), {method: lambda self, sample: None})
    with pytest.raises(ConfigError, match=rf"datasets\.mine: Own overrides {method}, .* Override {called}:"):
        own(f"{shards}/*.tar", BaseProcessor(), BaseProcessor(), "mine")


def test_it_has_no_length_and_no_end(shards):
    dataset = stream(f"{shards}/00000.tar")
    with pytest.raises(TypeError):
        len(dataset)
    counts = Counter(ids(dataset, 600))
    assert len(counts) == 30 and max(counts.values()) <= 25


def test_all_shards_are_drawn_and_mixed(shards):
    counts = Counter(image_id.split("/")[0] for image_id in ids(stream(f"{shards}/*.tar"), 1500))
    assert len(counts) == 4 and min(counts.values()) > 200
    assert len({image_id.split("/")[0] for image_id in ids(stream(f"{shards}/*.tar", shuffle_buffer=1000), 64)}) > 1


def test_same_seeds_same_stream_other_seeds_another(shards):
    base = {"seed": 42, "epoch": 3, "rank": 1}
    first = ids(stream(f"{shards}/*.tar", **base))
    assert ids(stream(f"{shards}/*.tar", **base)) == first
    for key in base:
        assert ids(stream(f"{shards}/*.tar", **{**base, key: base[key] + 1})) != first
    # (rank, epoch) and (epoch, rank) must not collide, as sums of them would
    assert ids(stream(f"{shards}/*.tar", **{**base, "epoch": 1, "rank": 3})) != first


def test_a_second_iteration_of_an_epoch_is_the_same(shards):
    dataset = stream(f"{shards}/*.tar")
    assert ids(dataset) == ids(dataset)


def test_workers_read_different_samples(shards):
    batches = DataLoader(stream(f"{shards}/*.tar"), batch_size=40, num_workers=2, collate_fn=list)
    first, second = ([sample["image_id"] for sample in batch] for batch in islice(batches, 2))
    assert first != second
    assert first == ids(stream(f"{shards}/*.tar"), 40)  # worker 0 of several is worker 0 of one


def test_it_starts_anywhere_in_a_shard(tmp_path):
    """Short epochs of large shards would otherwise see their heads only."""
    write_tar(tmp_path / "0.tar", good_members(0, 100))
    starts = [int(ids(stream(f"{tmp_path}/0.tar", epoch=e, shuffle_buffer=1), 1)[0].split("/")[1]) for e in range(80)]
    quarters = Counter(start // 25 for start in starts)
    assert len(quarters) == 4 and min(quarters.values()) > 10


def test_captions_of_which_the_text_processor_leaves_nothing(tmp_path):
    members = [m for i, text in enumerate(["...", "fine", "###!"]) for m in member_pair(i, text)]
    path = write_tar(tmp_path / "0.tar", members)
    dataset = ImageTextStream(str(path), BaseProcessor(), BlipCaptionProcessor())
    assert {sample["text_input"] for sample in islice(dataset, 20)} == {"fine"}
    assert dataset.decoded.left_out["an empty caption, after text_processor"] > 20


def test_texts_of_which_most_are_left_out_are_listed_all_the_same(tmp_path):
    """A text that can be used counts as one, also if no picture is read."""
    for shard in range(4):
        members = [m for i in range(60) for m in ((f"{i}.png", b""), (f"{i}.txt", b"fine" if i < 10 else b"..."))]
        write_tar(tmp_path / f"{shard}.tar", members)
    dataset = ImageTextStream(f"{tmp_path}/*.tar", BaseProcessor(), BlipCaptionProcessor())
    assert [text for _, text in dataset.texts()] == ["fine"] * 40


def member_pair(number: int, caption: str) -> list[tuple[str, bytes]]:
    return [(f"{number}.png", picture_bytes(number)), (f"{number}.txt", caption.encode())]


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "png", "webp", "JPG"])
def test_picture_formats(tmp_path, suffix):
    write_tar(tmp_path / "0.tar", [(f"a.{suffix}", picture_bytes(0)), ("a.json", b'{"caption": "x"}')])
    assert next(iter(stream(f"{tmp_path}/0.tar")))["image"].mode == "RGB"


@pytest.mark.parametrize(
    ("members", "caption"),
    [
        ([("a.json", b'{"caption": "from json"}'), ("a.txt", b"from txt")], "from json"),
        ([("a.txt", "from txt é".encode())], "from txt é"),
        ([("a.json", b'{"caption": null}'), ("a.txt", b"from txt")], "from txt"),
        ([("a.json", b'{"caption": " "}'), ("a.txt", b"from txt")], "from txt"),
        ([("a.json", b"{broken"), ("a.txt", b"from txt")], "from txt"),
        ([("a.json", b"[1, 2]"), ("a.txt", b"from txt")], "from txt"),
    ],
)
def test_where_the_caption_comes_from(tmp_path, members, caption):
    write_tar(tmp_path / "0.tar", [("a.png", picture_bytes(0)), *members])
    assert next(iter(stream(f"{tmp_path}/0.tar")))["text_input"] == caption


# --- storage


def test_storage_forms(shards):
    paths = [f"{shards}/{i:05d}.tar" for i in range(4)]
    for storage in (f"{shards}/{{00000..00003}}.tar", f"{shards}/*.tar", [f"{shards}/0000[01].tar", *paths[2:]]):
        assert expand_shards(storage, "laion") == paths
    assert expand_shards(paths[0], "laion") == paths[:1]
    urls = "https://host/{0..2}.tar"
    assert expand_shards([urls, paths[0]], "laion") == [f"https://host/{i}.tar" for i in range(3)] + paths[:1]
    assert expand_shards("pipe:curl -s https://host/{0..1}.tar", "laion")[1] == "pipe:curl -s https://host/1.tar"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "0.tar")
    (tmp_path / "1.tar").symlink_to(tmp_path / "elsewhere.tar")  # a link is taken at its word
    assert expand_shards(str(tmp_path / "1.tar"), "laion") == [str(tmp_path / "1.tar")]
    with pytest.raises(OSError, match=r"build_info\.storage=.*0\.tar is a pipe or a device.*pipe:COMMAND"):
        expand_shards(str(tmp_path / "{0..1}.tar"), "laion")


def test_home_and_relative_paths(shards, monkeypatch):
    monkeypatch.setenv("HOME", str(shards))
    assert expand_shards("~/00000.tar", "laion") == [f"{shards}/00000.tar"]
    monkeypatch.chdir(shards)
    assert expand_shards("{00000..00001}.tar", "laion") == ["00000.tar", "00001.tar"]


@pytest.mark.parametrize("folder", ["proj [1]", "a*b", "what?", "{a,b}", "x{1..3}", "w::x", "run:1", "a/proj [ab]/c"])
def test_literal_paths_come_before_patterns(tmp_path, monkeypatch, folder):
    write_shards(tmp_path / folder, count=3, samples=2)
    write_shards(tmp_path / "proj 1", count=1, samples=2)  # what the pattern would match
    monkeypatch.chdir(tmp_path)
    for root in ("", f"{tmp_path}/"):
        paths = [f"{root}{folder}/{i:05d}.tar" for i in range(3)]
        for pattern in ("*.tar", "{00000..00002}.tar", "0000[0-2].tar", "{00000,0000[12]}.tar"):
            assert expand_shards(f"{root}{folder}/{pattern}", "laion") == paths
        assert expand_shards(paths[1], "laion") == paths[1:2]
        with pytest.raises(OSError, match="7 of 10 shards are missing"):
            expand_shards(f"{root}{folder}/{{00000..00009}}.tar", "laion")
    assert len(set(ids(stream(f"{folder}/*.tar")))) == 6


def test_literal_names_below_a_pattern(tmp_path):
    for part in "ab":
        write_shards(tmp_path / part / "proj [1]", count=2)
    (tmp_path / "file").touch()
    found = expand_shards(f"{tmp_path}/*/proj [1]/*.tar", "laion")
    assert found == [f"{tmp_path}/{part}/proj [1]/0000{i}.tar" for part in "ab" for i in range(2)]


@pytest.mark.parametrize("name", ["x[1].tar", "x{1..3}.tar", "x*.tar"])
def test_a_literal_file(tmp_path, name):
    for other in (name, "x1.tar", "x2.tar"):
        write_tar(tmp_path / other, good_members(0, 2))
    assert expand_shards(f"{tmp_path}/{name}", "laion") == [f"{tmp_path}/{name}"]


def test_pipe_and_file_url_are_read(shards):
    for storage in (f"pipe:cat {shards}/00000.tar", f"file://{shards}/00000.tar"):
        assert len(set(ids(stream(storage), 200))) == 30


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        (
            "/path/to/laion/{00000..10488}.tar",
            "10489 of 10489 shards are missing, e.g. /path/to/laion/00000.tar. There is no",
        ),
        (
            "{shards}/{{00000..00009}}.tar",
            "6 of 10 shards are missing, e.g. {shards}/00004.tar. To take what is there:",
        ),
        ("{shards}/00009.tar", "1 of 1 shards are missing, e.g. {shards}/00009.tar"),
        ("{shards}/*.tgz", "no file matches"),
        ("{shards}", "is a folder; name the shards in it: {shards}/*.tar"),
        ("", "names no shards"),
        (None, "names no shards"),
        ([], "names no shards"),
        ([3], "names no shards"),
    ],
)
def test_bad_storage(shards, storage, message):
    if isinstance(storage, str) and "{shards}" in storage:
        storage = storage.format(shards=shards)
    with pytest.raises((OSError, ValueError)) as error:
        stream(storage)
    assert message.format(shards=shards) in str(error.value)
    assert "datasets.laion.build_info.storage=" in str(error.value)


# --- bad samples: left out, counted, never the end of a run


def bad_members(kind: str, first: int, count: int) -> list[tuple[str, bytes]]:
    picture, caption, text = (good_members(first, count)[i::3] for i in range(3))
    if kind == "no caption":
        return picture
    if kind == "null caption":
        return [m for p, c in zip(picture, caption, strict=True) for m in (p, (c[0], b'{"caption": null}'))]
    if kind == "no picture":
        return [m for pair in zip(caption, text, strict=True) for m in pair]
    if kind == "not a picture":
        return [m for p, c in zip(picture, caption, strict=True) for m in ((p[0], b"<html>404</html>"), c)]
    if kind == "truncated picture":
        return [m for p, c in zip(picture, caption, strict=True) for m in ((p[0], p[1][:60]), c)]
    raise AssertionError(kind)


BAD_SAMPLES = {
    "no caption": "a sample without caption",
    "null caption": "a sample without caption",
    "no picture": "a sample without picture",
    "not a picture": "an image that is not one",
    "truncated picture": "an image that is not one",
}


@pytest.mark.parametrize("kind", BAD_SAMPLES)
def test_some_bad_samples_are_left_out_with_a_warning(tmp_path, kind, caplog):
    write_tar(tmp_path / "0.tar", good_members(0, 10) + bad_members(kind, 10, 30) + good_members(40, 10))
    with caplog.at_level(logging.WARNING):
        found = set(ids(stream(f"{tmp_path}/0.tar"), 300))
    assert found == {f"0.tar/{i:09d}" for i in [*range(10), *range(40, 50)]}
    warnings = [record.getMessage() for record in caplog.records]
    assert any(BAD_SAMPLES[kind] in w and "laion: left out" in w and "0.tar" in w for w in warnings)
    assert len(warnings) < 12  # 1st, 10th, 100th of a cause


@pytest.mark.parametrize("kind", BAD_SAMPLES)
def test_nothing_but_bad_samples_is_an_error(tmp_path, kind):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", bad_members(kind, 20 * shard, 20))
    with pytest.raises(RuntimeError) as error:
        next(iter(stream(f"{tmp_path}/*.tar")))
    message = str(error.value)
    assert BAD_SAMPLES[kind] in message and "datasets.laion" in message
    assert "in 2 of 2 shards" in message and f"e.g. {tmp_path}/" in message


def test_one_bad_shard_of_many_is_not_the_end(tmp_path):
    """A shard of 300 bad samples is many in a row, but not a bad data set."""
    write_shards(tmp_path, count=4)
    write_tar(tmp_path / "bad.tar", bad_members("no caption", 1000, 300))
    assert len(set(ids(stream(f"{tmp_path}/*.tar"), 2000))) == 120


def test_a_bad_data_set_is_noticed_late_too(tmp_path):
    """The shards become unreadable while the run goes on."""
    write_shards(tmp_path, count=3)
    samples = iter(stream(f"{tmp_path}/*.tar"))
    assert len(list(islice(samples, 1500))) == 1500
    for path in tmp_path.glob("*.tar"):
        path.unlink()
    with pytest.raises(RuntimeError, match="a shard, or a part of it, that cannot be read") as error:
        list(islice(samples, 3000))
    assert int(re.search(r"of the last (\d+) samples", str(error.value))[1]) < 1000  # the good ones are long past


BAD_TARS = {
    "empty file": lambda good: b"",
    "not a tar": lambda good: b"version https://git-lfs.github.com/spec/v1\n" * 50,
    "truncated": lambda good: good[: len(good) // 2 + 100],
    "header overwritten": lambda good: good[: 512 * 40] + b"\xff" * (512 * 10) + good[512 * 50 :],
    "no members": lambda good: b"\0" * 10240,
}


@pytest.mark.parametrize("kind", BAD_TARS)
def test_corrupt_tars(tmp_path, kind, caplog):
    write_shards(tmp_path, count=1)
    good = write_tar(tmp_path / "source", good_members(500, 30)).read_bytes()
    (tmp_path / "bad.tar").write_bytes(BAD_TARS[kind](good))
    with caplog.at_level(logging.WARNING):
        found = {image_id for image_id in ids(stream(f"{tmp_path}/*.tar"), 300) if image_id.startswith("00000")}
    assert len(found) == 30
    assert any("bad.tar" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("kind", ["empty file", "not a tar", "no members"])
def test_nothing_but_corrupt_tars_is_an_error(tmp_path, kind):
    good = write_tar(tmp_path / "source", good_members(500, 30)).read_bytes()
    for name in "abcd":
        (tmp_path / f"{name}.tar").write_bytes(BAD_TARS[kind](good))
    with pytest.raises(RuntimeError, match="a shard"):
        next(iter(stream(f"{tmp_path}/*.tar")))


def test_failing_commands_are_an_error():
    with pytest.raises(RuntimeError, match="cannot be read; in 1 of 1 shards, e.g. pipe:false"):
        next(iter(stream("pipe:false")))


def test_a_bug_in_a_processor_is_not_a_bad_sample(shards):
    def broken(image: Image.Image):
        raise TypeError("a mistake of ours")

    with pytest.raises(TypeError, match="a mistake of ours"):
        next(iter(ImageTextStream(f"{shards}/*.tar", broken, BaseProcessor())))


def test_shards_of_img2dataset_with_folders_and_stats(tmp_path):
    members = [(f"./{name}", content) for name, content in good_members(0, 5)]
    write_tar(tmp_path / "0.tar", members + [("stats.json", json.dumps({"count": 5}).encode())])
    with tarfile.open(tmp_path / "0.tar") as tar:
        assert len(tar.getnames()) == 16
    assert len(set(ids(stream(f"{tmp_path}/0.tar"), 60))) == 5
