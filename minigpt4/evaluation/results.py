"""The folder of an evaluation: answers.jsonl, scores.json, answers.html, table.md and table.tex."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt4.common import dist_utils
from minigpt4.common.errors import ConfigError
from minigpt4.common.output import write_whole
from minigpt4.common.resumable import Lines, open_output
from minigpt4.common.text import pluralize
from minigpt4.evaluation.example import Answer, Example
from minigpt4.evaluation.generate import Answerer, answer_all
from minigpt4.evaluation.page import page
from minigpt4.evaluation.scores import measure, table

ANSWERS = "answers.jsonl"


def _id(entry: dict) -> str | None:
    """The id of the example that a line answers; None: this command did not write the line."""
    texts = isinstance(entry["id"], str) and isinstance(entry["answer"], str)
    return entry["id"] if texts and "ended" in entry else None


LINES = Lines("minigpt4 evaluate", "answer", b'{"id": ', _id)


def evaluate(
    answerer: Answerer,
    task: str,
    examples: Sequence[Example],
    folder: Path,
    settings: Mapping[str, Any],
    name: str,
    batch_size: int = 8,
    until_stopped: Callable = iter,
    check_stop: Callable[[], None] = lambda: None,
) -> list[str]:
    """Answer the examples with a model, on all ranks, and write the results. An interrupted call is continued.

    Args:
        task: registered name of the task.
        settings: what the answers depend on. Answers of other settings in the folder are a ConfigError.
        name: the model's name in tables.
        until_stopped: yields items until the process is asked to stop.
        check_stop: raises an exception on all ranks if one was asked.

    Returns:
        Why examples could not be answered.
    """
    settings = {**settings, "questions": digest(examples)}
    with open_output(folder / ANSWERS, settings, LINES) as output:
        skipped = answer_all(examples, answerer, output, batch_size, until_stopped)
        check_stop()
        dist_utils.from_main(lambda: write_results(folder, name, task, examples, settings))
    return skipped


def digest(examples: Sequence[Example]) -> str:
    """Identifies the questions, wherever their pictures are."""
    content = hashlib.sha256()
    for example in examples:
        pictures = [Path(picture).name for picture in example.pictures if isinstance(picture, str)]
        names = [value for key, value in example.names.items() if key != "image"]
        content.update(json.dumps([example.id, example.messages, names, pictures]).encode())
    return f"{len(examples)}, {content.hexdigest()[:16]}"


def write_results(folder: Path, name: str, task: str, examples: Sequence[Example], settings: Mapping[str, Any]) -> str:
    """Score the answers of a folder, write the other files, and return the table in Markdown.

    Raises ConfigError if there is no answer.
    """
    path = folder / ANSWERS
    lines = path.read_bytes().splitlines() if path.exists() else []
    entries = {entry["id"]: entry for entry in map(json.loads, lines)}
    answered = [example for example in examples if example.id in entries]
    if not answered:
        raise ConfigError("There is no answer to score. The warnings above say why.")
    answers = {each.id: Answer(entries[each.id]["answer"], entries[each.id]["ended"]) for each in answered}
    scores, figures = measure(task, examples, answers)
    if scores["unanswered"]:
        logging.warning("%s without an answer left out.", pluralize(scores["unanswered"], "question"))
    markdown, latex = table(scores, name)
    results = {
        "scores.json": json.dumps({**scores, "settings": settings}, indent=2, ensure_ascii=False) + "\n",
        "answers.html": page(name, scores, figures, answered, answers),
        "table.md": markdown,
        "table.tex": latex,
    }
    for file, text in results.items():
        write_whole(folder / file, text)
    logging.info("Written to %s: %s.", folder, ", ".join([ANSWERS, *results]))
    return markdown
