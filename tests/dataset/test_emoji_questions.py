import json
import random
import sys

import emoji_questions
import pytest
from emoji_questions import ANSWERS, COLOURS, KINDS, NUMBERS, QUESTIONS, colour_of, several, topic_of
from PIL import Image
from tiny_pictures import TINY_DIR, read_pictures
from tiny_text import load_concepts

from minigpt4.datasets.conversations.formats import read_records


@pytest.fixture(scope="module")
def drawings():
    """Those of an eighth of the concepts, with Noto's instead of OpenMoji's, which may not be installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji_questions, "load_concepts", lambda: load_concepts()[::8])
        return emoji_questions.load_drawings(TINY_DIR / "noto.tar.gz")


@pytest.fixture
def command(monkeypatch, drawings):
    """command(folder) runs the script, with few conversations."""
    monkeypatch.setattr(emoji_questions, "CONVERSATIONS", {"train": 60, "heldout": 30})
    monkeypatch.setattr(emoji_questions, "load_drawings", lambda openmoji: drawings)

    def run(folder):
        monkeypatch.setattr(sys, "argv", ["x", "--output", str(folder)])
        emoji_questions.main()

    return run


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_set(command, tmp_path, capsys):
    command(tmp_path / "set")
    assert "train.jsonl: 60 conversations" in capsys.readouterr().out
    seen, forms = set(), set()
    for split, number in (("train", 60), ("heldout", 30)):
        lines = (tmp_path / "set" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(lines) == number
        for record in map(json.loads, lines):
            asked = record["messages"][::2]
            topics = [topic_of(message["content"]) for message in asked]
            assert asked[0]["content"].startswith("<image> ")
            assert sum("<image>" in message["content"] for message in asked) == len(record["images"])
            for topic, message in zip(topics, record["messages"][1::2], strict=True):
                begin, end = ANSWERS[topic].split("{}")
                seen.add((topic, message["content"].removeprefix(begin).removesuffix(end)))
            forms.add((len(record["images"]), len(topics)))
    assert {(1, 1), (1, 2), (2, 2)} <= forms
    known = {"colour": set(COLOURS), "kind": set(KINDS.values()), "count": set(NUMBERS)}
    assert all(answer in known[topic] for topic, answer in seen) and {topic for topic, _ in seen} == set(QUESTIONS)
    name, records = read_records(str(tmp_path / "set" / "train.jsonl"), None, "auto", None, "emoji")
    assert name == "jsonl" and len(records) == 60


def test_names(command, tmp_path, drawings):
    command(tmp_path / "set")
    _, records = read_records(str(tmp_path / "set" / "names.jsonl"), None, "auto", None, "names")
    asked = {(records[i].messages[0].parts[-1], records[i].messages[1].parts[0]) for i in range(len(records))}
    assert asked == {("What is this?", drawing.concept.name) for drawing in drawings["train"]}


def test_the_same_bytes_twice_and_no_folder_is_changed(command, tmp_path):
    command(tmp_path / "a")
    command(tmp_path / "b")
    assert everything(tmp_path / "a") == everything(tmp_path / "b")
    (tmp_path / "b" / "train.jsonl").write_text("corrected by hand")
    before = everything(tmp_path / "b")
    with pytest.raises(SystemExit, match="b exists, and is not changed"):
        command(tmp_path / "b")
    assert everything(tmp_path / "b") == before


def test_an_interrupted_run_leaves_nothing(command, tmp_path, monkeypatch):
    monkeypatch.setattr(emoji_questions, "several", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        command(tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_missing_openmoji_says_what_to_run(tmp_path):
    with pytest.raises(SystemExit, match="prepare_tiny.py"):
        emoji_questions.load_drawings(tmp_path / "openmoji.tar")


def test_colours_are_those_of_the_pixels():
    pictures = read_pictures(TINY_DIR / "fluent.tar.gz")
    hearts = {"2764": "red", "1f49a": "green", "1f499": "blue", "1f49c": "purple", "1f90e": "brown", "1f49b": "yellow"}
    assert {key: colour_of(pictures[key]) for key in hearts} == hearts
    assert colour_of(pictures["1f308"]) is None  # a rainbow
    assert colour_of(Image.new("RGB", (64, 64), "white")) is None


@pytest.mark.parametrize("number", range(1, 5))
def test_things_to_count_stand_apart(number):
    picture = several(Image.new("RGB", (64, 64), "red"), number, random.Random(number))
    quarters = [picture.getpixel((x, y)) for x in (16, 48) for y in (16, 48)]
    assert quarters.count((255, 0, 0)) == number and quarters.count((255, 255, 255)) == 4 - number
