"""References in every form, recognised by content, scored with answers in a file through the command."""

import json

import pytest
from dataset_files import picture_bytes

from minigpt4.__main__ import main
from minigpt4.common.errors import ConfigError
from minigpt4.evaluation import references
from minigpt4.evaluation.answers import read_answers
from minigpt4.evaluation.page import _row
from minigpt4.evaluation.results import LINES

CAT, DOG = "A cat on a red sofa.", "A dog runs in the park."


def lines(*items: dict) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def people(*answers: str) -> list[dict]:
    return [{"answer": answer, "answer_id": n} for n, answer in enumerate(answers, 1)]


QUESTIONS = {
    "questions": [
        {"question_id": 420, "image_id": 42, "question": "What color is it?"},
        {"question_id": 421, "image_id": 42, "question": "How many?"},
    ],
    "data_subtype": "val2014",
}
ANNOTATIONS = {
    "annotations": [
        {
            "question_id": 420,
            "image_id": 42,
            "answer_type": "other",
            "answers": people(*["red"] * 8, "pink", "the red"),
        },
        {"question_id": 421, "image_id": 42, "answer_type": "number", "answers": people(*["2"] * 2, *["3"] * 8)},
    ]
}
COCO = {
    "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
    "annotations": [{"id": n, "image_id": n % 2 + 1, "caption": (CAT, DOG)[n % 2]} for n in range(4)],
}
TEXTVQA = {"data": [{"question_id": 7, "image_id": "ab", "question": "Which word?", "answers": ["stop"] * 10}]}
GQA = {"05": {"question": "Is it red?", "answer": "yes", "imageId": "n1", "types": {}}}
SCIENCE = {
    "3": {"question": "Which is cold?", "choices": ["fire", "ice"], "answer": 1, "hint": "", "image": None},
    "4": {
        "question": "Which?",
        "choices": ["a", "b"],
        "answer": 0,
        "image": "image.png",
        "split": "val",
        "subject": "x",
    },
}
POPE = (
    {"question_id": 1, "image": "1.jpg", "text": "Is there a cat in the image?", "label": "yes"},
    {"question_id": 2, "image": "1.jpg", "text": "Is there a dog in the image?", "label": "no"},
)
# files, answers, task, first figure
FORMS = {
    "coco": (
        {"captions.json": json.dumps(COCO)},
        json.dumps([{"image_id": 1, "caption": CAT}, {"image_id": 2, "caption": "Trees"}]),
        "caption",
        ("ROUGE-L", 0.5),
    ),
    "cc_sbu_align": (
        {"filter_cap.json": json.dumps({"annotations": [{"image_id": "a", "caption": CAT}]})},
        lines({"image": "/elsewhere/image/a.jpg", "caption": "A cat on a red sofa."}),
        "caption",
        ("ROUGE-L", 1),
    ),
    "vqa": (
        {"questions.json": json.dumps(QUESTIONS), "annotations.json": json.dumps(ANNOTATIONS)},
        lines({"question_id": 420, "answer": "Red!"}, {"question_id": 421, "answer": "two"}),
        "vqa",
        ("accuracy", (1 + 0.6) / 2),
    ),
    "textvqa": ({"t.json": json.dumps(TEXTVQA)}, lines({"question_id": 7, "answer": "STOP"}), "vqa", ("accuracy", 1)),
    "gqa": ({"g.json": json.dumps(GQA)}, lines({"question_id": "05", "answer": "No"}), "vqa", ("accuracy", 0)),
    "scienceqa": (
        {"problems.json": json.dumps(SCIENCE)},
        lines({"question_id": "3", "answer": "The answer is B."}, {"id": "4", "answer": "B"}),
        "choice",
        ("accuracy", 0.5),
    ),
    "pope": (
        {"coco_pope_random.json": lines(*POPE)},
        lines({"question_id": 1, "text": "Yes, there is."}, {"question_id": 2, "text": "I see a dog."}),
        "yes_no",
        ("F1", 2 / 3),
    ),
    "jsonl": (
        {"my.jsonl": lines({"image": "1.jpg", "caption": CAT}, {"image": "1.jpg", "caption": "A cat."})},
        lines({"image": "1.jpg", "caption": "a cat on a red sofa"}),
        "caption",
        ("ROUGE-L", 1),
    ),
    "questions": (
        {"my.jsonl": lines({"id": "x", "image": "1.jpg", "prompt": "What is it?", "answer": "A cat."})},
        lines({"id": "x", "answer": "cat"}),
        "vqa",
        ("accuracy", 1),
    ),
    "llava": (
        {
            "llava.json": json.dumps(
                [
                    {
                        "id": "1",
                        "image": "1.jpg",
                        "conversations": [
                            {"from": "human", "value": "<image>\nWhat is this?"},
                            {"from": "gpt", "value": "A cat."},
                            {"from": "human", "value": "Is it red?"},
                            {"from": "gpt", "value": "No."},
                        ],
                    }
                ]
            )
        },
        lines({"id": "1", "answer": "no"}),
        "yes_no",
        ("accuracy", 1),
    ),
    "flickr": (
        {"results.token": f"1.jpg#0\t{CAT}\n1.jpg#1\tA cat .\n2.jpg#0\t{DOG}\n"},
        lines({"image": "1.jpg", "caption": "A cat"}, {"image": "2.jpg", "caption": DOG}),
        "caption",
        ("ROUGE-L", 1),
    ),
    "csv": (
        {"my.csv": "image,question,answer\n1.jpg,Is it a cat?,Yes\n"},
        lines({"image": "1.jpg", "answer": "Yes"}),
        "yes_no",
        ("accuracy", 1),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_answers_in_a_file(form, tmp_path, capsys):
    files, answers, task, (figure, value) = FORMS[form]
    for name, text in {**files, "answers.jsonl": answers}.items():
        (tmp_path / name).write_text(text)
    arguments = ["--answers", tmp_path / "answers.jsonl", "--out", tmp_path / "out", "--data"]
    assert main(["evaluate", *map(str, [*arguments, *(tmp_path / name for name in files)])]) == 0
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["task"] == task and scores["unanswered"] == 0
    assert scores["figures"][figure]["value"] == pytest.approx(value)
    assert capsys.readouterr().out == (tmp_path / "out" / "table.md").read_text()
    if form == "vqa":
        assert scores["groups"]["number"]["figures"]["accuracy"]["value"] == pytest.approx(0.6)


def test_pictures_are_found_by_the_names_of_benchmarks(tmp_path):
    pictures = tmp_path / "pictures"
    for name in ("COCO_val2014_000000000042.jpg", "ab.jpg", "n1.jpg", "val/4/image.png", "1.jpg", "2.jpg"):
        (pictures / name).parent.mkdir(parents=True, exist_ok=True)
        (pictures / name).write_bytes(picture_bytes(0))
    for form in ("vqa", "textvqa", "gqa", "scienceqa", "pope", "coco"):
        files = FORMS[form][0]
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        paths = [str(tmp_path / name) for name in files]
        _, examples = references.read_examples(paths, str(pictures))
        assert all((pictures / picture).is_file() for example in examples for picture in example.pictures)
        with pytest.raises(ConfigError, match="--images"):
            references.read_examples(paths)
    _, examples = references.read_examples([str(tmp_path / "problems.json")], str(pictures))
    assert [len(example.pictures) for example in examples] == [0, 1]


@pytest.mark.parametrize("form", ["pope", "textvqa", "gqa", "coco", "cc_sbu_align", "questions"])
def test_each_of_several_files_is_a_group(form, tmp_path):
    """Such as the settings of POPE, whose questions have the same numbers in all files."""
    (content,) = FORMS[form][0].values()
    paths = [tmp_path / f"{name}.{'jsonl' if form == 'questions' else 'json'}" for name in ("random", "popular")]
    for path in paths:
        path.write_text(content)
    _, (*examples,) = references.read_examples([str(path) for path in paths], check=False)
    half = len(examples) // 2
    assert [example.group for example in examples] == ["random"] * half + ["popular"] * half
    assert all(example.id.startswith(f"{example.group}/") for example in examples)


def test_equal_questions_are_one_that_has_all_their_ids(tmp_path):
    """An answer may name any of them."""
    records = [{"id": name, "prompt": "What?", "answer": name} for name in ("a", "b", "c")]
    (tmp_path / "data.jsonl").write_text(lines(*records))
    _, (example,) = references.read_examples([str(tmp_path / "data.jsonl")])
    assert example.references == ("a", "b", "c")
    (tmp_path / "answers.jsonl").write_text(lines({"id": "b", "answer": "x"}, {"id": "c", "answer": "x"}))
    assert read_answers(str(tmp_path / "answers.jsonl"), [example])[0]["a"].text == "x"
    assert "<small>a, b, c</small>" in _row(example, "x", "0.0", [])


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (lines({"image_id": 42, "answer": "red"}), ("2 questions", "image_id 42", "its id: 420")),
        (lines({"question_id": 420, "answer": "a"}, {"question_id": 420, "answer": "b"}), ("line 2", "second answer")),
        (lines({"question_id": 9, "answer": "a"}), ("no answer to these references", "question_id")),
        (lines({"question_id": 420, "answer": 3}), ("line 1", "answer", "3", "text")),
        (lines({"answer": "red"}), ("line 1", "image_id")),
        ("{", ("line 1", "not JSON")),
    ],
)
def test_answers_that_cannot_be_scored(answers, words, tmp_path):
    for name, content in {"q.json": QUESTIONS, "a.json": ANNOTATIONS}.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "answers.jsonl").write_text(answers)
    arguments = ["--answers", tmp_path / "answers.jsonl", "--out", tmp_path / "out", "--data"]
    message = main(["evaluate", *map(str, [*arguments, tmp_path / "q.json", tmp_path / "a.json"])])
    assert all(word in message for word in words)
    assert not (tmp_path / "out").exists()


TEXT_QUESTION = {"question": "What?", "image_id": "a", "question_id": 1}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (QUESTIONS, ("annotations", "--data QUESTIONS ANNOTATIONS")),
        (ANNOTATIONS, ("has no questions",)),
        ({"3": {"question": "?", "choices": ["a"], "answer": 4}}, ("3", "index")),
        ({"3": {"question": "?", "choices": ["a"]}}, ("'answer'",)),
        ({"x": {"question": "?", "answer": "a"}}, ("'imageId'",)),
        ({"x": {"question": "?", "answer": None, "imageId": "1"}}, ("question x", "[None]")),
        ({"x": {"question": 5, "answer": "a", "imageId": "1"}}, ("'question' is 5", "text")),
        ({"data": [TEXT_QUESTION | {"answers": []}]}, ("question 1", "[]", "at least one")),
        ({"data": [TEXT_QUESTION | {"answers": "red"}]}, ("'answers' is 'red'", "list")),
        ({"question_id": 1, "image": 5, "text": "?", "label": "no"}, ("'image' is 5", "text")),
        ({"what": 1}, ("no known format",)),
        (None, ("there is no file",)),
    ],
)
def test_references_that_cannot_be_read(content, words, tmp_path):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(json.dumps(content))
    with pytest.raises(ConfigError) as error:
        references.read_examples([str(path)], check=False)
    assert str(path) in str(error.value) and all(word in str(error.value) for word in words)


@pytest.mark.parametrize("entry", [{"id": [1], "answer": "a"}, {"id": "1", "answer": 5}, {"id": None, "answer": "a"}])
def test_a_line_of_answers_jsonl_has_texts(entry):
    assert LINES.key_of(json.dumps(entry | {"ended": None}).encode()) is None


def test_files_of_different_tasks_are_refused(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(COCO))
    (tmp_path / "b.json").write_text(lines(*POPE))
    with pytest.raises(ConfigError, match="caption and yes_no"):
        references.read_examples([str(tmp_path / "a.json"), str(tmp_path / "b.json")], check=False)
