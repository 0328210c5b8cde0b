"""Answers that exist, from a file, matched with examples."""

import os
from collections.abc import Sequence

from minigpt4.common.errors import ConfigError
from minigpt4.datasets.conversations import formats
from minigpt4.datasets.conversations.text_files import shown
from minigpt4.evaluation.example import Answer, Example

NAMES = ("question_id", "id", "image_id", "image")
"""Keys that say what an answer is about; the first that a line has counts."""
TEXTS = ("answer", "caption", "text")


def read_answers(path: str, examples: Sequence[Example]) -> tuple[dict[str, Answer], int]:
    """{id of an example: answer} of a file of JSON lines or a JSON list, and the number of answers to no example.

    Raises ConfigError for a line without name or text, two answers to one example, a name that fits several examples,
    and a file without any answer to these examples.
    """
    index, found, others = _index(examples), {}, 0
    for where, item in formats.read_items(path):
        key = next((key for key in NAMES if item.get(key) is not None), None)
        given = next((name for name in TEXTS if item.get(name) is not None), None)
        if key is None or given is None:
            known = f"one of {', '.join(NAMES)}, and one of {', '.join(TEXTS)}"
            raise ConfigError(f"{where} has the keys {shown(list(item))}. An answer has {known}.")
        if not isinstance(text := item[given], str):
            raise ConfigError(f"{where}: its {given!r} is {shown(text)}; a text is expected. Put quotes around it.")
        ids = _look_up(index[key], key, str(item[key]))
        if len(ids) > 1:
            raise ConfigError(
                f"{where}: {len(ids)} questions have {key} {item[key]}. Name one by its id: {', '.join(ids[:3])}."
            )
        if ids and ids[0] in found and found[ids[0]].text != text:  # equal questions may have an answer each
            raise ConfigError(f"{where} is a second answer for {key} {item[key]}. Leave one.")
        if ids:
            found[ids[0]] = Answer(text, item.get("ended"))
        else:
            others += 1
    if not found:
        keys = sorted({key for example in examples[:100] for key in example.names})
        raise ConfigError(f"{path} has no answer to these references, which are known by {', '.join(keys)}.")
    return found, others


def _index(examples: Sequence[Example]) -> dict[str, dict[str, list[str]]]:
    """{key: {value: ids}} of all names of the examples. A picture is known by its path and by its name alone."""
    index: dict[str, dict[str, list[str]]] = {key: {} for key in NAMES}
    for example in examples:
        names = {*example.names.items(), *(("id", each) for each in (example.id, *example.merged))}
        if "image" in example.names:
            names.add(("image", os.path.basename(example.names["image"])))
        for key, value in names:
            index[key].setdefault(value, []).append(example.id)
    return index


def _look_up(index: dict[str, list[str]], key: str, value: str) -> list[str]:
    if key != "image":
        return index.get(value, [])
    tries = (os.path.abspath(value), value, os.path.basename(value))
    return next((index[each] for each in tries if each in index), [])
