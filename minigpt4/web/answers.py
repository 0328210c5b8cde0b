"""Answers to the page's questions, as a stream of updates.

The browser holds the conversation and sends all of it with each question. Answers are computed together by
`serving.batching`; those with beams by `Chat`, one at a time.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from minigpt4.conversation import Chat, Conversation, Decoding
from minigpt4.conversation.conversation import IMAGE_TURN
from minigpt4.serving.answer import Answer, Prompt
from minigpt4.serving.batching import Batcher
from minigpt4.serving.replies import UPDATE_SECONDS, event
from minigpt4.serving.sampling import RowSampling
from minigpt4.web.pictures import MAX_PICTURES, Uploads

MAX_CHARACTERS = 20_000  # in a question
MAX_MESSAGES = 400
MOST = {"num_beams": 10, "max_new_tokens": 1000, "max_length": Decoding.max_length}  # as on the page's sliders
LINE_SECONDS = 0.1  # how often the place in line is looked at
ANSWER_SECONDS = 3600  # an answer ends after that
REMEMBERED = 20  # answers from whose time the waiting time is estimated

_one_alone = threading.Lock()
_DECODING = TypeAdapter(Decoding)


class PageError(Exception):
    """A question cannot be answered. `code`: the key of a text of the page (texts.json), with `values` in it."""

    def __init__(self, status: int, code: str, **values):
        super().__init__(code)
        self.status, self.body = status, {"error": code, "values": values}


class Message(BaseModel):
    """A turn: the text, and the names of the uploads that come before it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["user", "assistant"]
    text: str = ""
    pictures: list[str] = []


class Question(BaseModel):
    """What the browser sends: the conversation, which ends with the question, and fields of `Decoding`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    messages: list[Message] = Field(min_length=1)
    settings: dict[str, bool | int | float | None] = {}

    def check(self) -> Decoding:
        """The settings. Raises PageError."""
        text = self.messages[-1].text
        if self.messages[-1].role != "user" or not text.strip():
            raise PageError(400, "ask_something")
        if len(text) > MAX_CHARACTERS:
            raise PageError(400, "long_question", characters=len(text), most=MAX_CHARACTERS)
        if len(self.messages) > MAX_MESSAGES:
            raise PageError(400, "long_talk")
        unknown = self.settings.keys() - {each.name for each in fields(Decoding)}
        if unknown:
            raise PageError(400, "bad_setting", detail=f"{min(unknown)[:100]!r}")
        try:
            decoding = _DECODING.validate_python(self.settings)
        except ValidationError as error:
            raise PageError(400, "bad_setting", detail=error.errors()[0]["msg"]) from None
        for name, most in MOST.items():
            if getattr(decoding, name) > most:
                raise PageError(400, "bad_setting", detail=f"{name}={getattr(decoding, name)} must be at most {most}.")
        return decoding


@dataclass
class Prepared:
    """A question that the model can answer: conversation, pictures [3,H,W] in order, settings.

    Attributes:
        prompt: of `conv`, without the oldest text if that is `outgrown`, because it does not fit into the context.
        fitting: the settings, cut to the context.
    """

    conv: Conversation
    pixels: list[torch.Tensor]
    decoding: Decoding
    prompt: str
    outgrown: bool
    fitting: Decoding


def prepare(chat: Chat, uploads: Uploads, question: Question) -> Prepared:
    """Read a question. Raises PageError: also 410 for uploads that are gone, with their names as `missing`."""
    decoding = question.check()
    shown = [uploads.get(upload_id) for message in question.messages for upload_id in message.pictures]
    pictures = sum(len(upload.pixels) if upload else 1 for upload in shown)
    if pictures > MAX_PICTURES:
        raise PageError(400, "too_many_pictures", pictures=pictures, most=MAX_PICTURES)
    conv, pixels, missing = chat.new_conversation(), [], []
    for message in question.messages:
        for upload_id in message.pictures:
            if upload := uploads.get(upload_id):
                pixels += upload.pixels
                for _ in upload.pixels:
                    conv.add_to_question(IMAGE_TURN)
            else:
                missing.append(upload_id)
        if message.role == "assistant":
            conv.append_message(conv.roles[1], chat.sanitize(message.text, conv))
        elif message.text:
            chat.ask(message.text, conv)
    if missing:
        raise PageError(410, "gone", missing=missing)
    waiting = conv.copy()
    waiting.append_message(conv.roles[1], None)
    try:
        shortened, fitting = chat.fit(waiting, decoding, lambda notice: None)
    except ValueError:
        raise PageError(400, "too_long") from None
    outgrown = len(shortened.answer_indices) < len(conv.answer_indices)
    return Prepared(conv, pixels, decoding, shortened.get_prompt(), outgrown, fitting)


class _Alone:
    """An answer of `Chat`, computed in a thread of its own. It has the members of an `Answer` that are used here."""

    def __init__(self, chat: Chat, prepared: Prepared, changed: Callable[[], None]):
        self._chat, self._prepared, self._changed = chat, prepared, changed
        self.started, self.finish, self.error, self.ids, self._text = False, None, None, [], ""
        threading.Thread(target=self._run, name="alone", daemon=True).start()

    def text(self) -> str:
        return self._text

    def end(self, finish: str, error: Exception | None = None) -> None:
        if not self.finish:
            self.error, self.finish = error, finish
        self._changed()

    def _run(self) -> None:
        while not _one_alone.acquire(timeout=0.2):
            if self.finish:
                return
        try:
            if not self.finish:
                self._answer()
        except Exception as error:
            logging.exception("An answer failed.")
            self.end("error", error)
        finally:
            _one_alone.release()

    def _answer(self) -> None:
        self.started = True
        self._changed()
        chat, images = self._chat, []
        for pixels in self._prepared.pixels:
            chat.upload_img(pixels, chat.new_conversation(), images)
        settings = vars(self._prepared.decoding)
        answering = chat.stream_answer(
            self._prepared.conv, images, lambda: self.finish is not None, lambda notice: None, **settings
        )
        while True:
            try:
                self._text = next(answering)
            except StopIteration as end:
                self.ids = [*end.value]
                break
            self._changed()
        self.end("length" if len(self.ids) >= self._prepared.fitting.max_new_tokens else "stop")


@dataclass
class Answering:
    """Computes the answers of the page.

    Args:
        batcher: the thread that owns the model.
        batch: number of answers that are computed together.
    """

    batcher: Batcher
    batch: int
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    async def updates(self, prepared: Prepared, client: str) -> AsyncIterator[str]:
        """Answer, as server-sent events, until the answer ends. Closing this iterator stops it.

        {"line", "seconds"}: the place in line and the estimated waiting time, or None; {"started": true}; {"add"}: more
        text; {"text"}: the whole text anew; {"error"}; at the end {"end", "tokens", "seconds", "notes"}.
        """
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the event loop is closed, because the server is stopping
                loop.call_soon_threadsafe(changed.set)

        answer = self._start(prepared, client, wake)
        try:
            start, update, shown = time.monotonic(), None, ""
            while not (answer.text() or answer.finish):
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), LINE_SECONDS)
                changed.clear()
                if not answer.started:
                    start = time.monotonic()
                before, update = update, {"started": True} if answer.started else self._line(answer)
                if update != before:
                    yield event(update)
            while True:
                changed.clear()
                finish, text = answer.finish, answer.text()
                if text != shown:
                    yield event({"add": text[len(shown) :]} if text.startswith(shown) else {"text": text})
                    shown = text
                if finish:
                    break
                await asyncio.sleep(UPDATE_SECONDS)
                await changed.wait()
            seconds = time.monotonic() - start
            if finish == "error":
                yield event({"error": _failure(answer), "values": {}})
            else:
                self._seconds.append(seconds)
                notes = _notes(prepared, len(answer.ids))
                yield event({"end": finish, "tokens": len(answer.ids), "seconds": seconds, "notes": notes})
        finally:
            self.batcher.cancel([answer])

    def _start(self, prepared: Prepared, client: str, wake: Callable[[], None]) -> Answer | _Alone:
        chat, decoding = self.batcher.chat, prepared.fitting
        if decoding.num_beams > 1:
            return _Alone(chat, prepared, wake)
        answer = Answer(
            chat.model.tokenizer,
            Prompt(prepared.prompt, prepared.pixels, chat.num_tokens(prepared.prompt)),
            RowSampling.of(decoding),
            max_tokens=decoding.max_new_tokens,
            stops=[prepared.conv.stop],
            label=prepared.conv.label,
            deadline=time.monotonic() + ANSWER_SECONDS,
            min_tokens=decoding.min_length,
            client=client,
            changed=wake,
        )
        self.batcher.submit([answer])
        return answer

    def _line(self, answer: Answer | _Alone) -> dict:
        place = self.batcher.place(answer) or 1
        if not self._seconds:
            return {"line": place, "seconds": None}
        mean = sum(self._seconds) / len(self._seconds)
        return {"line": place, "seconds": round(mean * (1 + (place - 1) // self.batch))}


def _failure(answer: Answer | _Alone) -> str:
    """The key of the text that says why an answer failed."""
    if isinstance(answer.error, torch.OutOfMemoryError):
        return "out_of_memory"
    return "failed" if answer.started else "stopping"


def _notes(prepared: Prepared, tokens: int) -> list[str]:
    """Keys of texts that belong to an answer."""
    full = tokens == prepared.fitting.max_new_tokens < prepared.decoding.max_new_tokens
    return ["outgrown"] * prepared.outgrown + ["full"] * full
