"""Sending answers to the client while the model's thread generates them: as a whole, or as a stream of events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress

import torch

from minigpt4.conversation import Chat
from minigpt4.serving.answer import Answer, Prompt
from minigpt4.serving.errors import ApiError
from minigpt4.serving.protocol import ChatRequest

UPDATE_SECONDS = 0.04  # between two events with text of a choice: reading all text for each token would cost too much
DONE = "data: [DONE]\n\n"


class Reply:
    """The answers to one request. It must be made in the event loop that sends them.

    Args:
        max_tokens: maximum length of an answer in tokens.
        client: who asked.
        deadline: time (`time.monotonic()`) at which the request is refused if an answer has not started.
    """

    def __init__(self, request: ChatRequest, prompt: Prompt, chat: Chat, max_tokens: int, client: str, deadline: float):
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        self._request, self._prompt, self._deadline = request, prompt, deadline
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        empty = chat.new_conversation()
        self.answers = [
            Answer(
                chat.model.tokenizer,
                prompt,
                request.sampling(n),
                max_tokens=max_tokens,
                stops=[empty.stop, *request.stop],
                label=empty.label,
                deadline=deadline,
                min_tokens=min(request.min_tokens, max_tokens),
                client=client,
                changed=self._signal_change,
            )
            for n in range(request.n)
        ]

    async def wait_for_first_token(self) -> None:
        """Wait until an answer has a token. Raises ApiError."""
        while not any(answer.ids or answer.finish for answer in self.answers):
            await self._wait_for_change()

    async def completion(self) -> dict:
        """Wait for all answers and return the body of the response. Raises ApiError."""
        while not all(answer.finish for answer in self.answers):
            await self._wait_for_change()
        self._raise_failure()
        choices = []
        for n, answer in enumerate(self.answers):
            message = {"role": "assistant", "content": answer.text(), "refusal": None}
            choices.append(_choice(n, answer.finish, message=message))
        return self._body("chat.completion", choices) | self._usage()

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events until all answers have ended. An error becomes an event, too."""
        try:
            async for chunk in self._chunks():
                yield event(chunk)
        except ApiError as error:
            yield event(error.body())
        yield DONE

    async def _chunks(self) -> AsyncIterator[dict]:
        sent = {n: "" for n in range(len(self.answers))}  # text sent so far, of the answers that have not ended
        for n in sent:
            yield self._chunk(n, {"role": "assistant", "content": ""})
        while True:
            self._raise_failure()
            for n, before in list(sent.items()):
                finish, text = self.answers[n].finish, self.answers[n].text()
                if text[len(before) :]:
                    yield self._chunk(n, {"content": text[len(before) :]})
                    sent[n] = text
                if finish:
                    yield self._chunk(n, {}, finish)
                    del sent[n]
            if not sent:
                break
            if any(sent.values()):  # the first text is sent at once
                await asyncio.sleep(UPDATE_SECONDS)
            await self._wait_for_change()
        if self._request.stream_options.include_usage:
            yield self._body("chat.completion.chunk", []) | self._usage()

    def _signal_change(self) -> None:
        """Wake the event loop. The model's thread calls this."""
        with suppress(RuntimeError):  # the event loop is closed, because the server is stopping
            self._loop.call_soon_threadsafe(self._changed.set)

    async def _wait_for_change(self) -> None:
        """Wait until an answer has changed. Raises ApiError if one has failed or has waited too long."""
        try:
            async with asyncio.timeout(max(0, self._deadline - time.monotonic())):
                await self._changed.wait()
        except TimeoutError:
            if not all(answer.started for answer in self.answers):
                message = "The server is too busy: the request has waited too long."
                raise ApiError(503, message, "timeout") from None
            await self._changed.wait()  # the deadline ends each answer at its next token
        self._changed.clear()
        self._raise_failure()

    def _raise_failure(self) -> None:
        failed = next((answer for answer in self.answers if answer.finish == "error"), None)
        if failed is None:
            return
        if isinstance(failed.error, torch.OutOfMemoryError):
            raise ApiError(503, "There is no memory for this request; try again later, or send less.", "out_of_memory")
        if failed.started:
            raise ApiError(500, "The model failed on this request. The server's log says why.")
        raise ApiError(503, "The server is stopping.", "not_ready")

    def _usage(self) -> dict:
        prompt, completion = self._prompt.num_tokens, sum(len(answer.ids) for answer in self.answers)
        counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        return {"usage": counts}

    def _chunk(self, choice: int, delta: dict, reason: str | None = None) -> dict:
        """A chunk of choice number `choice`."""
        return self._body("chat.completion.chunk", [_choice(choice, reason, delta=delta)])

    def _body(self, kind: str, choices: list[dict]) -> dict:
        """The fields that all responses to one request have in common, with `choices`."""
        common = {"id": self._id, "object": kind, "created": self._created, "model": self._request.model}
        return common | {"choices": choices}


def _choice(index: int, reason: str | None, **content: dict) -> dict:
    return {"index": index, **content, "logprobs": None, "finish_reason": reason}


def event(content: dict) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
