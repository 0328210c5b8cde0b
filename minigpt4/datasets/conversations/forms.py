"""One function per format: the parsed record → its turns. `make_record` turns these into messages.

A turn is (role, content). The content is a text, in which `<image>` is the place of the record's next picture, or a
list of parts: `{"type": "text", "text": …}`, `{"type": "image"}` (the record's next picture, or its own under "image")
and `{"type": "image_url", "image_url": {"url": …}}`. Texts in a list of parts are taken as they are.

Our own format, one object on a line (.jsonl):

    {"image": "cat.jpg", "caption": "A cat on a red sofa."}
    {"image": "cat.jpg", "prompt": "Which animal is this?", "answer": "A cat."}
    {"images": ["a.jpg", "b.jpg"], "messages": [{"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "<image> and <image>: what differs?"}, {"role": "assistant", "content": "…"}]}

`image` is one picture, `images` a list; `id` and `system` are optional. Pictures: see `pictures.PictureFolder`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from itertools import cycle
from typing import Any

from minigpt4.common.errors import ConfigError
from minigpt4.common.text import pluralize
from minigpt4.datasets.conversations.pictures import Find
from minigpt4.datasets.conversations.record import Message, Picture, Record
from minigpt4.datasets.conversations.text_files import shown

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
ROLES["system"] = "system"
PLACE = "<image>"

Turns = list[tuple[Any, Any]]
Form = Callable[[Mapping[str, Any]], Turns]


def ours(item: Mapping[str, Any]) -> Turns:
    """`messages`, or `prompt` and `answer` (also named `caption`), or `caption` alone."""
    if item.get("messages") is not None:
        return _turns(item["messages"], "messages", ("role", "content"))
    if item.get("answer") == "" and item.get("caption") and not item.get("prompt"):
        item = {**item, "answer": None}  # an empty cell of a table that has questions, too
    answer = item.get("caption") if item.get("prompt") and item.get("answer") is None else item.get("answer")
    if answer is not None:
        return [("user", item.get("prompt") or ""), ("assistant", _literal(answer))]
    if item.get("caption") is None:
        raise ConfigError(
            f"has the keys {shown(list(item))}. A record has 'messages', or 'prompt' and 'answer', or 'caption'."
        )
    if not pictures_of(item):
        raise ConfigError("has a caption and no picture. Name it under 'image', or write 'prompt' and 'answer'.")
    return [("user", ""), ("assistant", _literal(item["caption"]))]


def conversations(item: Mapping[str, Any]) -> Turns:
    """LLaVA and ShareGPT: `conversations` of from/value, or of role/content."""
    return _turns(item.get("conversations"), "conversations", ("from", "value"), ("role", "content"))


def openai(item: Mapping[str, Any]) -> Turns:
    """`messages`, with pictures in parts "image_url". Several messages of the user in a row are one question.

    OpenAI's own example has the text in one message and the picture in the next.
    """
    turns: Turns = []
    for role, content in _turns(item.get("messages"), "messages", ("role", "content")):
        parts = _literal(content)
        if turns and role == turns[-1][0] == "user" and isinstance(parts, list) and isinstance(turns[-1][1], list):
            parts = [*turns.pop()[1], *parts]
        turns.append((role, parts))
    if any(isinstance(m, dict) and m.get("weight") == 0 for m in item["messages"]):
        raise ConfigError("has a message with 'weight': 0, an answer not to be learnt. Take the record out.")
    return turns


def texts(item: Mapping[str, Any]) -> Turns:
    """The Cauldron: `texts` of user/assistant. All pictures stand before the first question."""
    pairs = item.get("texts")
    if not isinstance(pairs, list) or not all(isinstance(p, dict) and {"user", "assistant"} <= set(p) for p in pairs):
        raise ConfigError(f"has {shown(pairs)} under 'texts', not a list of {{'user': …, 'assistant': …}}.")
    turns = [(role, pair[role]) for pair in pairs for role in ("user", "assistant")]
    if turns:
        places = [{"type": "image"}] * len(pictures_of(item))
        turns[0] = ("user", [*places, {"type": "text", "text": turns[0][1]}])
    return turns


def any_form(item: Mapping[str, Any]) -> Turns:
    """The form that the keys of the record show."""
    form = conversations if item.get("conversations") is not None else texts if item.get("texts") is not None else ours
    return form(item)


def _literal(content: Any) -> Any:
    """A text in which `<image>` is no place of a picture."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _turns(value: Any, key: str, *names: tuple[str, str]) -> Turns:
    """(role, content) of a list of messages under one of the pairs of `names`."""
    expected = " or ".join(f"{{'{role}': …, '{content}': …}}" for role, content in names)
    if not isinstance(value, list) or not value:
        raise ConfigError(f"has {shown(value)} under '{key}', not a list of {expected}.")
    turns = []
    for number, message in enumerate(value, 1):
        pair = next((p for p in names if isinstance(message, dict) and p[0] in message and p[1] in message), None)
        if pair is None:
            raise ConfigError(f"has {shown(message)} as message {number} of '{key}', not {expected}.")
        turns.append((message[pair[0]], message[pair[1]]))
    return turns


def pictures_of(item: Mapping[str, Any]) -> list[Any]:
    """The pictures under `image` or `images` of a record, each of which has one or a list."""
    values = [item[key] for key in ("image", "images") if item.get(key)]
    return [each for value in values for each in (value if isinstance(value, list) else [value])]


def make_record(form: Form, item: Mapping[str, Any], find: Find, where: str) -> Record:
    """The record of a parsed item. Raises ConfigError, without the place, for a mistake in it."""
    turns = form(item)
    if item.get("system"):
        turns = [("system", item["system"]), *turns]
    pieces = [_pieces(content) for _, content in turns]
    _fill(pieces, [find(value) for value in pictures_of(item)], [role for role, _ in turns], find)
    messages = []
    for number, ((role, _), parts) in enumerate(zip(turns, pieces, strict=True), 1):
        name = ROLES.get(role) if isinstance(role, str) else None
        if name is None:
            raise ConfigError(f"has the role {shown(role)} in message {number}. Roles are: {', '.join(ROLES)}.")
        parts = tuple(part for part in parts if part != "")
        if not parts:
            raise ConfigError(f"has nothing in message {number} ({name}). Write a text, or take the record out.")
        if name != "user" and any(isinstance(part, Picture) for part in parts):
            raise ConfigError(f"has a picture in message {number} ({name}). Pictures stand in questions only.")
        messages.append(Message(name, parts))
    _check_order([message.role for message in messages])
    return Record(tuple(messages), record_id(item), where)


def _pieces(content: Any) -> list[Any]:
    """Texts, `None` for the place of the record's next picture, and parts with a picture of their own."""
    if isinstance(content, str):
        return [piece if number % 2 == 0 else None for number, piece in enumerate(re.split(f"({PLACE})", content))]
    if not isinstance(content, list):
        raise ConfigError(f"has {shown(content)} for a text. A message is a text, or a list of parts.")
    pieces = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            pieces.append(part["text"])
        elif kind == "image":
            pieces.append({"own": part["image"]} if part.get("image") is not None else None)
        elif kind == "image_url":
            url = part.get("image_url")
            pieces.append({"own": url.get("url") if isinstance(url, dict) else url})
        else:
            known = '{"type": "text", "text": "…"}, {"type": "image"}, {"type": "image_url", "image_url": {"url": "…"}}'
            raise ConfigError(f"has the part {shown(part)} in a message. Parts are {known}.")
    return pieces


def _fill(pieces: list[list[Any]], pictures: list[Picture], roles: list[Any], find: Find) -> None:
    """Put the pictures into their places. A single picture without one stands before the first question's text."""
    places = sum(piece is None for parts in pieces for piece in parts)
    asked = next((number for number, role in enumerate(roles) if role in ("user", "human")), None)
    if len(pictures) == 1 and not places and asked is not None:
        pieces[asked].insert(0, None)
        places = 1
    if places != len(pictures):
        raise ConfigError(
            f"names {pluralize(len(pictures), 'picture')} and has {pluralize(places, 'place')} for pictures. Write "
            f"{PLACE} once for each picture, where it stands in the question."
        )
    waiting = iter(pictures)
    for parts in pieces:
        for number, piece in enumerate(parts):
            if piece is None:
                parts[number] = next(waiting)
            elif isinstance(piece, dict):
                parts[number] = find(piece["own"])


def _check_order(roles: list[str]) -> None:
    first = 2 if roles[:1] == ["system"] else 1
    rule = "Question (user, human) and answer (assistant, gpt) come in turn, perhaps after one system text."
    for number, (role, right) in enumerate(zip(roles[first - 1 :], cycle(("user", "assistant")), strict=False), first):
        if role != right:
            raise ConfigError(f"has message {number} of {role}, where one of {right} belongs. {rule}")
    if roles[-1:] != ["assistant"]:
        raise ConfigError(f"has no answer at its end. {rule}")


def record_id(item: Mapping[str, Any]) -> str:
    """The key "id" of the record, or a hash of all else but the content of pictures."""
    own = item.get("id")
    if isinstance(own, str | int) and not isinstance(own, bool) and own != "":
        return str(own)
    content = json.dumps(item, sort_keys=True, default=lambda value: "" if isinstance(value, bytes) else str(value))
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()
