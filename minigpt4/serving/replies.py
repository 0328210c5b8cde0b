"""From answers that a thread is writing to what is sent to the client, whole or piece by piece."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress

from minigpt4.conversation import CONV_VISION, Chat
from minigpt4.serving.batching import Answer, Prompt
from minigpt4.serving.errors import ApiError
from minigpt4.serving.protocol import ChatRequest, Envelope, usage

DONE = "data: [DONE]\n\n"


class Reply:
    """The answers to one request. Made in the event loop that sends them.

    Args:
        max_tokens: most tokens of an answer.
        deadline: `time.monotonic()` at which it is given up if an answer still waits.
    """

    def __init__(self, asked: ChatRequest, prompt: Prompt, chat: Chat, max_tokens: int, deadline: float):
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        self._asked, self._prompt, self._deadline = asked, prompt, deadline
        self._envelope = Envelope(asked.model)
        self.answers = [
            Answer(
                chat.model.tokenizer,
                prompt,
                asked.sampling(n),
                max_tokens=max_tokens,
                stops=[CONV_VISION.sep2 or CONV_VISION.sep, *asked.stop],
                label=f"{CONV_VISION.roles[1]}:",
                deadline=deadline,
                changed=self._tell,
            )
            for n in range(asked.n)
        ]

    async def begun(self) -> None:
        """Wait for the first token. Raises ApiError."""
        while not any(answer.ids or answer.finish for answer in self.answers):
            await self._news()

    async def whole(self) -> dict:
        """Wait for all answers; the body of a response. Raises ApiError."""
        while not all(answer.finish for answer in self.answers):
            await self._news()
        self._check()
        texts = [answer.text() for answer in self.answers]
        return self._envelope.completion(texts, [answer.finish for answer in self.answers], self._usage())

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events, until all answers have ended. An error is an event, too."""
        try:
            async for chunk in self._chunks():
                yield _event(chunk)
        except ApiError as error:
            yield _event(error.body())
        yield DONE

    async def _chunks(self) -> AsyncIterator[dict]:
        sent = {n: "" for n in range(len(self.answers))}  # of the answers that go on
        for n in sent:
            yield self._envelope.chunk(n, {"role": "assistant", "content": ""})
        while True:
            self._check()
            for n, before in list(sent.items()):
                finish, text = self.answers[n].finish, self.answers[n].text()
                if text[len(before) :]:
                    yield self._envelope.chunk(n, {"content": text[len(before) :]})
                    sent[n] = text
                if finish:
                    yield self._envelope.chunk(n, {}, finish)
                    del sent[n]
            if not sent:
                break
            await self._news()
        if self._asked.stream_options.include_usage:
            yield self._envelope.usage_chunk(self._usage())

    def _tell(self) -> None:
        """Called by the model's thread."""
        with suppress(RuntimeError):  # the loop has ended: the server is stopping
            self._loop.call_soon_threadsafe(self._changed.set)

    async def _news(self) -> None:
        """Wait until an answer has changed. Raises ApiError for one that will never come."""
        try:
            async with asyncio.timeout(max(0, self._deadline - time.monotonic())):
                await self._changed.wait()
        except TimeoutError:
            if not all(answer.begun for answer in self.answers):
                raise ApiError(
                    503, "The server is too busy: the request has waited too long.", "timeout", None, 5
                ) from None
            await self._changed.wait()  # its thread ends it at the next token
        self._changed.clear()
        self._check()

    def _check(self) -> None:
        if any(answer.finish == "error" for answer in self.answers):
            if all(answer.begun for answer in self.answers):
                raise ApiError(500, "The model failed on this request. The server's log says why.")
            raise ApiError(503, "The server is stopping.", "not_ready")

    def _usage(self) -> dict:
        return usage(self._prompt.num_tokens, sum(len(answer.ids) for answer in self.answers))


def _event(content: dict) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
