"""The figures of the quick start, and its contact sheet, from the results of `minigpt4 evaluate`."""

import json

import pytest
from dataset_files import picture_bytes
from PIL import Image
from tiny_names import known_to_head  # registers the task
from tiny_report import figures_of, main
from tiny_text import caption_of, load_concepts

from minigpt4.evaluation import Answer, Example
from minigpt4.evaluation.scores import measure


@pytest.fixture
def folders(tmp_path):
    """Evaluations of twenty concepts, of which the known answers name every second, and what they ended with."""
    concepts, heldout = load_concepts()[:20], tmp_path / "heldout"
    (heldout / "image").mkdir(parents=True)
    records = [{"image_id": str(n), "caption": concept.name} for n, concept in enumerate(concepts)]
    (heldout / "filter_cap.json").write_text(json.dumps({"annotations": records}))
    right = [caption_of(concept.name) for concept in concepts]
    wrong = [*right[1:], right[0]]
    half = [a if n % 2 else b for n, (a, b) in enumerate(zip(right, wrong, strict=True))]
    texts = {"untrained": ["?"] * 20, "stage1": half, "stage2": [f"This is a {name}. It is one." for name in half]}
    examples = []
    for n, concept in enumerate(concepts):
        (heldout / "image" / f"{n}.jpg").write_bytes(picture_bytes(n))
        examples.append(Example(str(n), (("user", (None,)),), (concept.name,), (str(heldout / "image" / f"{n}.jpg"),)))
    for name, answers in texts.items():
        (tmp_path / name).mkdir()
        given = {str(n): Answer(text, ended=n != 3) for n, text in enumerate(answers)}
        scores, _ = measure("tiny_names", examples, given)
        (tmp_path / name / "scores.json").write_text(json.dumps(scores))
        lines = [{"id": e.id, "image": e.pictures[0], "answer": given[e.id].text, "ended": True} for e in examples]
        (tmp_path / name / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {name: tmp_path / name for name in texts}


@pytest.mark.slow
def test_figures_of_known_answers(folders, tmp_path, monkeypatch, capsys):
    head = known_to_head([concept.name for concept in load_concepts()[:20]])
    both = sum(known for n, known in enumerate(head) if n % 2)
    expected = [20, 0, 50, round(100 * both / sum(head), 1), 100 * sum(head) / 20]
    figures = list(figures_of(folders).values())
    assert figures[:5] == expected and figures[6:] == [50, 95] and 0 <= figures[5] < 30
    given = [part for name, folder in folders.items() for part in (f"--{name}", str(folder))]
    monkeypatch.setattr("sys.argv", ["tiny_report.py", *given, "--output", str(tmp_path / "out")])
    main()
    assert "named, stage 2: 50.0" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet:
        assert sheet.width > 1000


def test_all_heads_answers_together():
    """73.3 % of Fluent's drawings, as the model card says."""
    known = known_to_head([concept.name for concept in load_concepts()])
    assert round(100 * sum(known) / len(known), 1) == 73.3 and len(known) == 1594
