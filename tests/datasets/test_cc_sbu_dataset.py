"""The folder with filter_cap.json: what comes out, and everything that may be wrong with it."""

import json
import logging
import os
import pickle

import pytest
from dataset_files import picture_bytes, write_align
from PIL import Image

from minigpt4.datasets.datasets.cc_sbu_dataset import CCSBUAlignDataset
from minigpt4.datasets.datasets.packed_strings import PackedStrings
from minigpt4.processors import BaseProcessor


def align_dataset(folder) -> CCSBUAlignDataset:
    return CCSBUAlignDataset(str(folder), BaseProcessor())


def rewrite(folder, content) -> None:
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    (folder / "filter_cap.json").write_bytes(text if isinstance(text, bytes) else text.encode())


def test_records(tmp_path):
    dataset = align_dataset(write_align(tmp_path))
    assert len(dataset) == 12
    assert [dataset[i]["text_input"] for i in range(12)] == [f"Caption Number {i}!" for i in range(12)]
    sample = dataset[3]
    assert sample["image_id"] == "3" and sample["image"].size == (20, 20) and sample["image"].mode == "RGB"
    assert dataset[-1]["image_id"] == "11"
    with pytest.raises(IndexError):
        dataset[12]
    assert len(list(dataset)) == 12


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".png", ".webp", ".JPG"])
def test_suffixes(tmp_path, suffix):
    assert align_dataset(write_align(tmp_path, suffix=suffix))[0]["image"].size == (20, 20)


def test_jpg_wins_and_numbers_are_ids_too(tmp_path):
    write_align(tmp_path, records=2)
    (tmp_path / "image" / "0.png").write_bytes(picture_bytes(0, size=9))
    rewrite(tmp_path, {"annotations": [{"image_id": 0, "caption": "x"}]})
    assert align_dataset(tmp_path)[0]["image"].size == (20, 20)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"annotations": [', "is not JSON in UTF-8: .*line 1 column"),
        (b'{"annotations": "\xff"}', "is not JSON in UTF-8"),
        ([], "no records under the key 'annotations'"),
        ({"annotation": []}, "no records under the key 'annotations'"),
        ({"annotations": []}, "no records under the key 'annotations'"),
        ({"annotations": ["a", {"caption": "a"}]}, r"annotations\[0\] cannot be used .*'image_id'"),
        ({"annotations": [{"image_id": "0", "caption": None}]}, r"annotations\[0\] cannot be used \(a caption"),
    ],
)
def test_malformed_annotations(tmp_path, content, message):
    rewrite(write_align(tmp_path), content)
    with pytest.raises(ValueError, match=message) as error:
        align_dataset(tmp_path)
    assert str(tmp_path / "filter_cap.json") in str(error.value) and "Expected {" in str(error.value)


@pytest.mark.parametrize("missing", ["", "filter_cap.json", "image"])
def test_missing_parts(tmp_path, missing):
    folder = write_align(tmp_path / "align")
    (folder / missing).rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError) as error:
        align_dataset(folder)
    message = str(error.value)
    assert f"there is no {folder / missing}. " in message
    assert "--options datasets.cc_sbu_align.build_info.storage=" in message


def test_missing_pictures(tmp_path):
    write_align(tmp_path)
    for i in (4, 7):
        (tmp_path / "image" / f"{i}.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 12 records have no picture, e\.g\. .*image/4\{\.jpg,"):
        align_dataset(tmp_path)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", picture_bytes(0, format="JPEG")[:200]])
def test_an_image_that_is_not_one_is_replaced_by_the_next(tmp_path, content, caplog):
    write_align(tmp_path)
    (tmp_path / "image" / "11.jpg").write_bytes(content)
    dataset = align_dataset(tmp_path)
    with caplog.at_level(logging.WARNING):
        samples = [dataset[i] for i in [*range(12), 11]]
    assert [sample["image_id"] for sample in samples] == [*map(str, range(11)), "0", "0"]
    assert samples[-1]["text_input"] == "Caption Number 0!"
    (warning,) = [record.getMessage() for record in caplog.records]
    assert str(tmp_path / "image" / "11.jpg") in warning and "an image that is not one" in warning


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_left_out(tmp_path, caplog):
    """Opening it would wait for ever."""
    (write_align(tmp_path) / "image" / "3.jpg").unlink()
    os.mkfifo(tmp_path / "image" / "3.jpg")
    dataset = align_dataset(tmp_path)
    assert dataset[3]["image_id"] == "4"
    assert "it is a pipe or a device" in caplog.text
    (tmp_path / "filter_cap.json").unlink()
    os.mkfifo(tmp_path / "filter_cap.json")
    with pytest.raises(OSError, match="it is a pipe or a device.*filter_cap.json"):
        align_dataset(tmp_path)


def test_a_picture_of_16_bits(tmp_path):
    folder = write_align(tmp_path, records=1, suffix=".png")
    Image.new("I;16", (9, 9), 100 * 257).save(folder / "image" / "0.png")
    assert align_dataset(folder)[0]["image"].getpixel((3, 3)) == (100, 100, 100)


def test_nothing_but_bad_images_is_an_error(tmp_path):
    write_align(tmp_path, records=20)
    for i in range(3, 15):
        (tmp_path / "image" / f"{i}.jpg").write_bytes(b"text")
    dataset = align_dataset(tmp_path)
    with pytest.raises(RuntimeError, match=r"10 records in a row, from .*image/4\.jpg on"):
        dataset[4]


def test_a_bug_in_a_processor_is_not_a_bad_image(tmp_path):
    dataset = CCSBUAlignDataset(str(write_align(tmp_path)), lambda image: image.no_such_attribute)
    with pytest.raises(AttributeError, match="no_such_attribute"):
        dataset[0]


def captions_of(folder, *captions) -> None:
    """Give the first records these captions."""
    records = json.loads((folder / "filter_cap.json").read_text())["annotations"]
    for record, caption in zip(records, captions, strict=False):
        record["caption"] = caption
    rewrite(folder, {"annotations": records})


def test_records_without_a_usable_caption_are_left_out_and_counted(tmp_path, caplog):
    captions_of(write_align(tmp_path), "", " \n", "\ud83d", None, ["a"], "###", "\ufeffmarked")
    with caplog.at_level(logging.WARNING):
        dataset = align_dataset(tmp_path)
    samples = [dataset[i] for i in range(len(dataset))]
    assert [sample["image_id"] for sample in samples] == [str(i) for i in range(5, 12)]
    assert [sample["text_input"] for sample in samples][:3] == ["###", "marked", "Caption Number 7!"]
    assert all(sample["image"].size == (20, 20) for sample in samples)
    assert dataset.unusable == {
        "an empty caption": 2,
        "a caption with lone surrogates or control characters": 1,
        "a caption that is not a text": 2,
    }
    for words in ("left out 2 records", "an empty caption", str(tmp_path / "filter_cap.json")):
        assert words in caplog.text


def test_records_without_an_id_are_left_out_and_counted(tmp_path):
    records = [{"caption": "a"}, "a text", {"image_id": "1", "caption": "fine"}, {"image_id": 1.5, "caption": "b"}]
    rewrite(write_align(tmp_path), {"annotations": records})
    dataset = align_dataset(tmp_path)
    assert [dataset[i]["text_input"] for i in range(len(dataset))] == ["fine"]
    assert dataset.unusable == {"a record without 'image_id' that is a string or a whole number": 3}


def test_no_usable_caption_at_all(tmp_path):
    captions_of(write_align(tmp_path, records=3), "", "\ud83d", "")
    with pytest.raises(ValueError, match=r"annotations\[0\] cannot be used \(an empty caption"):
        align_dataset(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_list_in_another_encoding(tmp_path, encoding):
    content = {"annotations": [{"image_id": "0", "caption": "Ein Café 😀"}]}
    rewrite(write_align(tmp_path), json.dumps(content, ensure_ascii=False).encode(encoding))
    assert align_dataset(tmp_path)[0]["text_input"] == "Ein Café 😀"


def test_a_list_nested_too_deeply(tmp_path):
    rewrite(write_align(tmp_path), b"[" * 100_000)
    with pytest.raises(ValueError, match=r"filter_cap.json is not JSON in UTF-8: .*nested too deeply"):
        align_dataset(tmp_path)


def test_many_broken_pictures_give_few_warnings(tmp_path, caplog):
    write_align(tmp_path, records=120)
    for i in range(0, 120, 2):
        (tmp_path / "image" / f"{i}.jpg").write_bytes(b"text")
    dataset = align_dataset(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert len([dataset[i] for i in range(120)]) == 120
    assert len(caplog.records) == 2  # the 1st and the 10th
    assert dataset.take_left_out().total() == 60


def test_packed_strings():
    strings = ["", "plain", "é日本😀", "line\nbreak", "", "\ud800"]
    packed = PackedStrings(strings)
    assert len(packed) == len(strings) and [packed[i] for i in range(len(packed))] == strings
    assert packed[-2] == "" and list(pickle.loads(pickle.dumps(packed))) == strings
    for index in (6, -7):
        with pytest.raises(IndexError):
            packed[index]
    assert len(PackedStrings([])) == 0
