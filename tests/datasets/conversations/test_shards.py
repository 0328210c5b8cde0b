"""Conversation shards through the reader of laion and cc_sbu: any tar, in any order, with several pictures a sample."""

import bz2
import gzip
import json
import logging
import lzma
import random
from collections import Counter
from itertools import islice

import pytest
from dataset_files import picture_bytes, write_tar

from minigpt4.datasets import patience
from minigpt4.datasets.builders import ConversationBuilder
from minigpt4.datasets.datasets import tar_reader

PROCESSORS = {split: {"name": "blip2_image_eval", "image_size": 16} for split in ("train", "eval")}
PICTURE = picture_bytes(0)


def stream(*paths, **build_info):
    info = {"storage": list(map(str, paths)), **build_info}
    builder = ConversationBuilder({"build_info": info, "vis_processor": PROCESSORS})
    builder.name = "mine"
    return builder.build_datasets()["train"]


def read(*paths) -> tuple[dict[str, tuple[str, int]], Counter]:
    """{key: (last answer, pictures)} of the samples of one pass, and the counts by cause of the rest."""
    dataset = stream(*paths)
    items = [*dataset.one_pass(0, 1)]
    found = {i["image_id"].partition("/")[2]: (i["text_input"][-1][1][0], len(i["pictures"])) for i in items}
    assert len(found) == len(items)
    causes: Counter[str] = Counter()
    for (cause, *_), count in dataset.take_left_out().items():
        causes[cause] += count
    return found, causes


def sample(key: str, pictures: int, **fields) -> list[tuple[str, bytes]]:
    """A record with so many pictures: `<key>.png`, or `<key>.0.png`, `<key>.1.png`, …"""
    names = [f"{key}.png"] if pictures == 1 else [f"{key}.{number}.png" for number in range(pictures)]
    places = "<image>" * (pictures if pictures > 1 else 0)  # one needs none
    record = {"prompt": f"{places}What?", "answer": key} | fields
    return [*((name, PICTURE) for name in names), (f"{key}.json", json.dumps(record).encode())]


SAMPLES = {"1": 1, "2": 2, "3": 0, "v1": 1, "v1.2": 1, "v1.2.5": 3, "d.x/photo 2.0 (final)": 2, "d.x/photo 2": 1}
EXPECTED = {key: (key, pictures) for key, pictures in SAMPLES.items()}


def members() -> list[list[tuple[str, bytes]]]:
    return [sample(key, pictures) for key, pictures in SAMPLES.items()]


def flat(groups) -> list[tuple[str, bytes]]:
    return [member for group in groups for member in group]


ORDERS = {
    "sample by sample": lambda m: flat(m),
    "text first in each": lambda m: flat(group[::-1] for group in m),
    "sorted by name": lambda m: sorted(flat(m)),
    "pictures first": lambda m: sorted(flat(m), key=lambda member: member[0].endswith("json")),
    "texts first": lambda m: sorted(flat(m), key=lambda member: not member[0].endswith("json")),
    "backwards": lambda m: flat(m)[::-1],
}


@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_members(tmp_path, order):
    assert read(write_tar(tmp_path / "0.tar", ORDERS[order](members()))) == (EXPECTED, {})


@pytest.mark.parametrize("companions", ["._{}", "__MACOSX/{}", ".DS_Store", "Thumbs.db", "README.md"])
def test_files_between_the_members_of_a_sample(tmp_path, companions):
    def beside(name: str) -> str:
        folder, slash, file = name.rpartition("/")
        return folder + slash + companions.format(file)

    each = [m for name, content in flat(members()) for m in ((beside(name), b"\0\5\x16\7"), (name, content))]
    assert read(write_tar(tmp_path / "0.tar", each)) == (EXPECTED, {})


def test_texts_beside_the_json_of_a_sample_come_last(tmp_path):
    """The .txt of a sample that has a .json is no sample of its own, wherever it stands."""
    texts = [(f"{key}.txt", b"A caption.") for key in SAMPLES]
    assert read(write_tar(tmp_path / "0.tar", [*flat(members()), *texts])) == (EXPECTED, {})


def test_members_in_random_order(tmp_path):
    """A record whose pictures follow late is not taken for one without pictures; they have the order of their names."""
    keys = [f"{i:03d}" for i in range(14)]  # and so many pictures
    each = [
        (name, name.encode() if name.endswith("png") else c) for i, k in enumerate(keys) for name, c in sample(k, i)
    ]
    for seed in range(20):
        random.Random(seed).shuffle(each)
        records = [raw.record for raw in stream(write_tar(tmp_path / "0.tar", each)).part(0)]
        assert sorted(record.messages[-1].parts[0] for record in records) == keys
        for record in records:
            key = record.messages[-1].parts[0]
            assert record.pictures == [name.encode() for name, _ in sample(key, int(key))[:-1]]


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_tars_named_tar(tmp_path, compress):
    path = tmp_path / "0.tar"
    path.write_bytes(compress(write_tar(tmp_path / "plain", flat(members())).read_bytes()))
    assert read(path) == (EXPECTED, {})


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda good: good[: len(good) // 2 + 100], "the rest of a tar that was cut off"),
        (lambda good: b"<html>" * 100, "a shard, or a part of it, that cannot be read"),
        (lambda good: bytes(10240), "a shard without samples"),
        (lambda good: gzip.compress(good)[:-200], "the rest of a tar that was cut off"),
    ],
)
def test_a_damaged_shard_counts_once(tmp_path, damage, cause):
    path = tmp_path / "0.tar"
    path.write_bytes(damage(write_tar(tmp_path / "good", flat(sample(str(i), i % 3) for i in range(12))).read_bytes()))
    found, causes = read(path)
    assert causes == {cause: 1} and len(found) < 12
    assert all(pictures == int(key) % 3 for key, (_, pictures) in found.items())


def test_the_cause_of_shards_without_samples_is_named(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", [(f"{i}.gif", b"GIF89a") for i in range(300)])
    with caplog.at_level(logging.WARNING), pytest.raises(RuntimeError, match=r"300 × a sample without text \(\.json"):
        next(iter(stream(tmp_path / "0.tar")))
    assert all(len(record.getMessage()) < 400 for record in caplog.records)


def test_shards_that_come_back(tmp_path, monkeypatch, later):
    monkeypatch.setattr(patience, "FIRST_PAUSE", 0.02)
    (tmp_path / "shards").mkdir()
    path = write_tar(tmp_path / "shards/0.tar", flat(members()))
    dataset = stream(path)
    away = (tmp_path / "shards").rename(tmp_path / "away")
    later(lambda: away.rename(tmp_path / "shards"))
    assert len([*dataset.one_pass(0, 1)]) == len(SAMPLES)
    assert dataset.take_left_out() == {("a file that was out of reach", str(path), "waited for"): 1}


def test_members_too_far_apart(tmp_path, monkeypatch):
    """What waits takes up to MAX_WAITING. Beyond that it is left out; no question is read without its picture."""
    monkeypatch.setattr(tar_reader, "MAX_WAITING", 1 << 20)
    large = [(name, c + bytes(300_000) if name.endswith("png") else c) for name, c in flat(members())]
    for order in ("pictures first", "texts first"):
        found, causes = read(write_tar(tmp_path / "0.tar", ORDERS[order]([large])))
        assert found.items() < EXPECTED.items() and causes.total()


def test_a_mistake_in_a_record_is_left_out_and_named(tmp_path, caplog):
    each = [*sample("1", 2, prompt="<image>?"), *sample("2", 1), *sample("3", 1, image=["3.png", "4.png"])]
    path = write_tar(tmp_path / "0.tar", each)
    with caplog.at_level(logging.WARNING):
        assert read(path) == ({"2": ("2", 1)}, {"a record with a mistake": 2})
    assert "names 2 pictures and has 1 place" in caplog.text


def test_the_stream_is_a_function_of_seed_epoch_and_rank(tmp_path):
    path = write_tar(tmp_path / "0.tar", flat(sample(str(i), i % 3) for i in range(30)))

    def ids(seed, epoch, rank):
        dataset = stream(path)
        dataset.set_seed(seed, rank)
        dataset.shuffle_buffer = 20
        dataset.set_epoch(epoch)
        return [item["image_id"] for item in islice(dataset, 40)]

    assert ids(0, 0, 0) == ids(0, 0, 0)
    assert len({tuple(ids(*each)) for each in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}) == 4
