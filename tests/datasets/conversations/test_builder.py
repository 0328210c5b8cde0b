"""The builder `conversation`: from a user's file to batches."""

import json
import logging
from itertools import islice

import pytest
import torch
from dataset_files import picture_bytes, write_tar

from minigpt4.common.errors import ConfigError
from minigpt4.datasets.builders import ConversationBuilder
from minigpt4.datasets.conversations.formats import Records
from minigpt4.datasets.loaders import eval_loader
from minigpt4.datasets.splits import in_share

PROCESSORS = {split: {"name": "blip2_image_eval", "image_size": 28} for split in ("train", "eval")}


def build(storage, **build_info):
    builder = ConversationBuilder({"build_info": {"storage": str(storage), **build_info}, "vis_processor": PROCESSORS})
    builder.name = "my_photos"
    return builder.build_datasets()


def record(number: int, **fields) -> dict:
    return {
        "id": f"r{number}",
        "image": f"{number % 3}.png",
        "prompt": f"Question {number}?",
        "answer": f"A{number}.",
    } | fields


def write_jsonl(folder, records):
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture_bytes(number))
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records))
    return path


@pytest.fixture
def twelve(tmp_path):
    return write_jsonl(tmp_path, [record(number) for number in range(12)])


def test_a_sample_and_a_batch(tmp_path):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "<image>\nWhich? <image>"},
        {"role": "assistant", "content": "The second. KEPT, as it is!"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "因为"},
    ]
    several = {"id": "s", "images": ["0.png", "1.png"], "messages": messages}
    path = write_jsonl(tmp_path, [several, record(1), {"prompt": "Hi", "answer": "Hello"}])
    dataset = build(path)["train"]
    batch = dataset.collater([dataset[0], dataset[1], dataset[2]])
    assert batch["text_input"] == [
        (
            ("system", ("Be brief.",)),
            ("user", (None, "\nWhich? ", None)),
            ("assistant", ("The second. KEPT, as it is!",)),
            ("user", ("Why?",)),
            ("assistant", ("因为",)),
        ),
        (("user", (None, "Question 1?")), ("assistant", ("A1.",))),
        (("user", ("Hi",)), ("assistant", ("Hello",))),
    ]
    assert batch["image"].shape == (3, 3, 28, 28) and batch["image_mean"].shape == (3, 3)
    assert torch.equal(batch["image"][1], batch["image"][2]) and not torch.equal(batch["image"][0], batch["image"][1])
    assert dataset.text_length(1) == len("Question 1?A1.")
    assert dataset.collater([dataset[2]])["image"].shape[0] == 0


def test_a_val_share_that_never_moves(tmp_path):
    path = write_jsonl(tmp_path, [record(number) for number in range(200)])
    splits = build(path, val=0.1)
    ids = {split: {dataset.records[i].id for i in range(len(dataset))} for split, dataset in splits.items()}
    assert ids["train"] | ids["val"] == {f"r{number}" for number in range(200)} and not ids["train"] & ids["val"]
    assert 8 < len(ids["val"]) < 32
    write_jsonl(tmp_path, [record(number) for number in reversed(range(260))])
    later = build(path, val=0.1)["val"]
    assert {later.records[i].id for i in range(len(later))} & {f"r{n}" for n in range(200)} == ids["val"]
    assert in_share("r1", 1.0) and not in_share("r1", 0.0)


def test_val_as_a_file(tmp_path, twelve):
    (tmp_path / "val.jsonl").write_text(json.dumps(record(99)) + "\n")
    splits = build(twelve, val=str(tmp_path / "val.jsonl"))
    assert (len(splits["train"]), len(splits["val"])) == (12, 1)
    assert splits["val"][0]["image_id"] == "r99"


@pytest.mark.parametrize("val", [1, 1.5, -0.1, float("nan"), 1e-9])
def test_a_share_that_is_none(twelve, val):
    with pytest.raises(ConfigError, match="datasets.my_photos.build_info.val"):
        build(twelve, val=val)


def test_unusable_records_are_left_out_and_counted(tmp_path, caplog):
    records = [record(0), record(1, answer=" \ud83d"), record(2, answer="a\x00b"), record(3)]
    dataset = build(write_jsonl(tmp_path, records))["train"]
    (tmp_path / "2.png").write_bytes(b"no picture")
    assert [dataset[index]["image_id"] for index in range(4)] == ["r0", "r3", "r3", "r3"]
    counts = dataset.take_left_out()
    assert sum(counts.values()) == 3 and all("mine.jsonl line" in place for _, place, *_ in counts)
    (tmp_path / "0.png").write_bytes(b"no picture either")
    with pytest.raises(RuntimeError, match="my_photos"):
        dataset[0]


def test_two_sets_by_one_builder_and_the_format_in_the_log(twelve, caplog):
    caplog.set_level(logging.INFO)
    build(twelve)
    assert "my_photos: 12 records, read as jsonl." in caplog.text


def test_shards_are_a_stream(tmp_path):
    members = [
        member
        for number in range(8)
        for member in (
            (f"{number:03}.png", picture_bytes(number)),
            (f"{number:03}.json", json.dumps({"prompt": f"Q{number}", "answer": "x" if number else ""}).encode()),
        )
    ]
    write_tar(tmp_path / "00000.tar", members)
    stream = build(tmp_path / "00000.tar")["train"]
    stream.set_seed(1)
    samples = [*islice(stream, 20)]
    assert {sample["text_input"][0][1][-1] for sample in samples} == {f"Q{number}" for number in range(1, 8)}
    assert [sample["image_id"] for sample in islice(stream, 20)] == [sample["image_id"] for sample in samples]
    assert stream.take_left_out()


def test_records_of_val_that_stand_in_train_are_named(tmp_path, caplog):
    path = write_jsonl(tmp_path, [record(number) for number in range(4)])
    (tmp_path / "val.jsonl").write_text(json.dumps(record(2)) + "\n" + json.dumps(record(9)) + "\n")
    build(path, val=str(tmp_path / "val.jsonl"))
    assert any("1 id of val" in line and "r2" in line for line in caplog.messages)


def test_lengths_are_known_without_reading_a_record_again(tmp_path, monkeypatch):
    splits = build(write_jsonl(tmp_path, [record(number, answer="A" * number + "!") for number in range(30)]), val=0.3)
    monkeypatch.setattr(Records, "__getitem__", None)
    lengths = [split.text_length(index) for split in splits.values() for index in range(len(split))]
    ids = [id for split in splits.values() for id in split.records.ids]
    assert dict(zip(ids, lengths, strict=True)) == {f"r{n}": len(f"Question {n}?") + n + 1 for n in range(30)}


def test_a_file_out_of_reach_is_waited_for_and_a_bad_record_of_val_is_not_replaced(tmp_path):
    path = write_jsonl(tmp_path, [record(number) for number in range(3)])
    dataset = build(path)["train"]
    dataset.patience.timeout_s = 0.0
    (tmp_path / "1.png").write_bytes(b"none")
    batches = list(eval_loader(dataset, batch_size=2, num_workers=0))
    assert [id for batch in batches for id in batch["image_id"]] == ["r0", "r2"]
    path.unlink()
    assert dataset.item_or_none(0) is None
    assert [cause for cause, *_ in dataset.take_left_out()] == ["a record in a file that is out of reach"]
