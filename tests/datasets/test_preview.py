"""Samples as the model reads them: what is shown is what `prepare` makes, and nothing else changes."""

import json
import random
from itertools import islice
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dataset_files import good_members, write_align, write_shards, write_tar

from minigpt4.datasets.conversations.batch import Conversations
from minigpt4.datasets.conversations.dataset import ConversationDataset
from minigpt4.datasets.conversations.formats import read_records
from minigpt4.datasets.conversations.stream import ConversationStream
from minigpt4.datasets.datasets.cc_sbu_dataset import CCSBUAlignDataset
from minigpt4.datasets.datasets.image_text_stream import ImageTextStream
from minigpt4.datasets.preview import MAX_SHOWN, Preview, Segment, TextReader, first_texts
from minigpt4.models.prompt import IGNORE_INDEX
from minigpt4.processors import BlipCaptionProcessor

PROMPTS = ["###Human: <Img><ImageHere></Img> Describe it. ###Assistant: ", "###Human: <ImageHere> ###Assistant: "]
CAPTION = "a red bus"
TURNS = (
    ("system", ("Be brief.",)),
    ("user", (None, None, "What differs?")),
    ("assistant", ("The kind",)),
    ("user", ("And this ###?", None)),
    ("assistant", ("a red bus",)),
)


@pytest.mark.parametrize("text", [CAPTION, "a </s> bus", TURNS, (("user", (None,)), ("assistant", (CAPTION,)))])
@pytest.mark.parametrize("max_txt_len", [4, 200])
def test_what_is_shown_is_what_is_trained(build_golden_model, text, max_txt_len):
    model = build_golden_model(template="vicuna_v0", max_txt_len=max_txt_len)
    model.prompt_list, queries = PROMPTS, model.query_tokens.shape[1]
    shown = TextReader.of_model(model).read(text, 3)
    caption = isinstance(text, str)
    images = torch.zeros(1 if caption else sum(parts.count(None) for _, parts in text), 3, 28, 28)
    samples = {"image": images, "text_input": [text] if caption else Conversations([text]), "drawn_prompt": PROMPTS[1]}
    samples = model.sanitize(samples)
    batch = model.prepare(samples)["tokens"]
    assert shown.num_tokens == batch.num_tokens and shown.num_learnt == batch.num_labels
    assert (shown.cut, shown.broken_up) == (max_txt_len == 4, "broken_up" in samples)
    start = 0
    for segment in shown.segments:
        ids, labels = (row[0, start : start + segment.num_tokens].tolist() for row in (batch.input_ids, batch.labels))
        assert segment.learnt == (labels[0] != IGNORE_INDEX) and not (segment.is_image and segment.learnt)
        assert segment.num_tokens == queries if segment.is_image else segment.text == model.tokenizer.decode(ids, False)
        start += segment.num_tokens
    assert sum(segment.is_image for segment in shown.segments) * queries == batch.num_image_vectors


def test_a_line_of_a_log():
    segments = [Segment("<s>\n", False, 2), Segment("<ImageHere>", False, 8), Segment("x" * 999 + "#\t", True, 400)]
    shown = Preview(segments, cut=False, broken_up=False, ends_early=False)
    assert (shown.num_tokens, shown.num_learnt) == (410, 400)
    line = str(shown)
    assert line.startswith("410 tokens, 400 learnt: <s>\\n<ImageHere>«xxx") and line.endswith("xxx#\\t»")
    assert "…" in line and len(line) < MAX_SHOWN + 80
    assert "cut at model.max_txt_len, markers broken up" in str(shown._replace(cut=True, broken_up=True))


def conversations(folder, count=4):
    lines = [{"id": str(i), "prompt": f"Question {i}?", "answer": f"Answer {i}."} for i in range(count)]
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return read_records(str(folder / "x.jsonl"))[1]


def shards_of_conversations(folder):
    records = [("0.json", b'{"prompt": "a", "answer": 3}')]
    records += [(f"{i}.json", json.dumps({"prompt": f"Question {i}?", "answer": "b"}).encode()) for i in (1, 2)]
    write_tar(folder / "0.tar", records)
    return read_records(str(folder / "0.tar"))[1]


def no_picture(*_):
    raise AssertionError("A picture was opened.")


def broken_and_good(folder):
    write_tar(folder / "0.tar", [("a.png", b""), ("a.txt", b"\0"), *good_members(0, 3)])
    return str(folder / "0.tar")


DATASETS = {
    "captions": lambda d: ImageTextStream(broken_and_good(d), no_picture, BlipCaptionProcessor(), "laion"),
    "descriptions": lambda d: CCSBUAlignDataset(str(write_align(d)), no_picture),
    "conversations": lambda d: ConversationDataset(conversations(d), no_picture, "q"),
    "a stream of them": lambda d: ConversationStream(shards_of_conversations(d), no_picture, "q"),
}
FIRST = {
    "captions": ["sample 0", "sample 1"],
    "descriptions": ["Caption Number 0!", "Caption Number 1!"],
    "conversations": [(("user", (f"Question {i}?",)), ("assistant", (f"Answer {i}.",))) for i in (0, 1)],
    "a stream of them": [(("user", (f"Question {i}?",)), ("assistant", ("b",))) for i in (1, 2)],
}


@pytest.mark.parametrize("kind", DATASETS)
def test_the_first_usable_texts_without_a_picture(tmp_path, kind):
    tmp_path.joinpath("align").mkdir()
    dataset = DATASETS[kind](tmp_path)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    found = first_texts(dataset, 2)
    assert [text for _, text in found] == FIRST[kind] and len({id for id, _ in found}) == 2
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert not dataset.take_left_out()  # what was left out here is counted by the run, if it meets it
    assert len(first_texts(dataset, 99)) == len([*dataset.texts()]) < 99


def test_a_stream_goes_on_as_if_nothing_was_shown(tmp_path):
    def stream():
        return ImageTextStream(str(write_shards(tmp_path) / "*.tar"), lambda picture: 0, str, "laion", shuffle_buffer=5)

    shown, other = stream(), stream()
    first_texts(shown, 9)
    ids = [[sample["image_id"] for sample in islice(each, 40)] for each in (shown, other)]
    assert ids[0] == ids[1]


class Squares(torch.utils.data.Dataset):
    """A plug-in's dataset."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return {"text_input": f"{random.random():.1f}"}


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        raise AssertionError("It was read.")


class Slow:
    """A dataset on a slow network."""

    def texts(self):
        yield "0", "first"
        Event().wait(30)
        yield "1", "second"


def test_nothing_waits_for_long():
    assert first_texts(Slow(), 2, seconds=0.2) == [("0", "first")]


def test_an_error_is_raised():
    with pytest.raises(ZeroDivisionError):
        first_texts(SimpleNamespace(texts=lambda: (1 / number for number in (1, 0))), 2)


def test_datasets_of_plug_ins():
    before = random.getstate()
    ((_, text),) = first_texts(Squares(), 2)
    assert float(text) >= 0 and random.getstate() == before
    assert first_texts(Endless(), 2) == []
