"""The one place that decides which caption can be trained on: its encoding, its JSON and its characters.

    caption = usable(decode(content))                     # of a text file
    caption = usable(load_json(content)["caption"])       # of a JSON file

Each of these raises `Unusable`, whose text is the cause under which datasets count a sample that they leave out.
Markers of the prompt inside a caption are broken up later, by the model, which knows its tokenizer
(`models.prompt.sanitize`).
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from minigpt4.common.text import encoding_of

MISSING = 'a sample without caption (.json with "caption", or .txt)'

# Lone surrogates, which no tokenizer takes, and control characters: signs of UTF-16 or of data read as UTF-8.
BLANK = " \u2800\u3164"  # spaces, and letters without ink
_NO_TEXT = re.compile("[\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffd-\uffff]")


class Unusable(ValueError):
    """A caption, or a whole sample, cannot be trained on. The text is the cause, for people and for counting."""


class Incomplete(Unusable):
    """A part of the sample is missing. It may still follow."""


def decode(content: bytes) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark. Raises Unusable for others."""
    try:
        return content.decode(encoding_of(content))
    except UnicodeDecodeError:
        raise Unusable("a caption that is not in UTF-8 (nor in UTF-16 with a byte-order mark)") from None


def load_json(content: bytes) -> Any:
    """The content of a JSON file in UTF-8, UTF-16 or UTF-32. Raises Unusable if it is broken or nested too deeply."""
    try:
        return json.loads(content)
    except ValueError as error:
        raise Unusable("a JSON file that is broken") from error
    except RecursionError:
        raise Unusable("a JSON file that is nested too deeply") from None


def usable(caption: Any) -> str:
    """The caption without a byte-order mark, otherwise unchanged.

    Raises Unusable for what is not a string, has nothing to read, or has characters that no text has.
    """
    if not isinstance(caption, str):
        raise Unusable("a caption that is not a text")
    caption = caption.removeprefix("\ufeff")
    if _NO_TEXT.search(caption):
        raise Unusable("a caption with lone surrogates or control characters")
    if not any(char.isprintable() and char not in BLANK for char in caption):
        raise Unusable("an empty caption")
    return caption


def read_caption(files: Mapping[str, bytes]) -> str:
    """The caption of a sample {suffix: content}: the key "caption" of its .json, or its .txt if that is not usable.

    Raises Unusable; Incomplete if it has neither.
    """
    problem: Unusable = Incomplete(MISSING)
    if "json" in files:
        try:
            return usable(_in_json(files["json"]))
        except Unusable as error:
            problem = error
    if "txt" in files:
        return usable(decode(files["txt"]))
    raise problem


def _in_json(content: bytes) -> Any:
    record = load_json(content)
    caption = record.get("caption") if isinstance(record, dict) else None
    if caption is None:
        raise Incomplete(MISSING)
    return caption
