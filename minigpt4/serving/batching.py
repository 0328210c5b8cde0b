"""The queue of answers, and the thread that owns the model and generates them in batches.

The thread takes the waiting answers in order, up to the batch size, and generates them as one left-padded batch. Later
answers wait for the next batch. Each answer has its own sampling, stop texts, length and deadline.

Q query tokens per image, D width of the language model.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch

from minigpt4.conversation import Chat, Decoding
from minigpt4.models.generation import StopOnText, answer_text, continue_embeds, end_ids
from minigpt4.models.sampling import MinNewTokens
from minigpt4.models.tokenizer import Tokenizer
from minigpt4.serving.sampling import RowSampler, RowSampling

IMAGES_AT_ONCE = 16
GATHER_SECONDS = 0.01  # a batch waits this long for further answers before it starts


@dataclass(frozen=True, eq=False)
class Prompt:
    """A text with image placeholders, its images [3,H,W] in order, and its length in tokens, images included."""

    text: str
    pixels: list[torch.Tensor]
    num_tokens: int


@dataclass(eq=False)
class Answer:
    """An answer that is waiting, being generated, or complete.

    Attributes:
        stops: texts that end the answer.
        label: a text that models repeat at the beginning of an answer ("Assistant:"), and which is removed.
        deadline: time (`time.monotonic()`) at which the answer ends at its current length.
        min_tokens: neither a token nor a stop text ends the answer before it has so many tokens.
        changed: called by the model's thread after each token and at the end.
        ids: the token ids so far.
        started: True once a batch with this answer has started.
        finish: None until the answer has ended, then "stop", "length", "cancelled" or "error".
    """

    tokenizer: Tokenizer
    prompt: Prompt
    sampling: RowSampling
    max_tokens: int
    stops: list[str]
    label: str
    deadline: float
    min_tokens: int = Decoding.min_length
    changed: Callable[[], None] = lambda: None
    ids: list[int] = field(default_factory=list)
    started: bool = False
    finish: str | None = None

    def __post_init__(self) -> None:
        self._stop, self._ends = StopOnText(self.tokenizer, *self.stops), end_ids(self.tokenizer)

    def add_token(self, token: int) -> None:
        """Append a token, and end the answer if the token, a stop text, the length or the deadline requires it."""
        if self.finish:
            return
        self.ids.append(token)
        if token in self._ends or self._stop.reached(self.ids):
            self.end("stop")
        elif len(self.ids) >= self.max_tokens or time.monotonic() > self.deadline:
            self.end("length")
        else:
            self.changed()

    def end(self, finish: str) -> None:
        """End the answer, unless it has already ended."""
        if not self.finish:
            self.finish = finish
            self.changed()

    def text(self) -> str:
        """The text so far. Each text begins with the previous one, because text that was sent cannot be changed.

        For this reason the label is removed only at the beginning, unlike in `Chat`.
        """
        complete = self.finish is not None
        text = answer_text(self.tokenizer, list(self.ids), self.stops, complete=complete)
        if not complete and self.label.startswith(text):
            return ""
        return text.removeprefix(self.label).lstrip()


class Batcher(threading.Thread):
    """The thread that loads the model and generates answers.

    Attributes:
        chat: None until the model is loaded.
        failure: the exception that `load` raised.
        closed: True after `close`.
        waiting: the answers in the queue.
        running: the answers of the current batch.
        fill_batches: fill up batches of several answers to `max_batch` rows. This is done on a GPU, where each batch
            size needs CUDA graphs of its own, and a further row costs almost nothing.

    Args:
        load: makes the `Chat`.
        max_batch: maximum number of answers in a batch.
        failed: called after `load` has raised an exception.
    """

    def __init__(self, load: Callable[[], Chat], max_batch: int, failed: Callable[[], None] = lambda: None):
        super().__init__(name="model", daemon=True)
        self.chat: Chat | None = None
        self.failure: BaseException | None = None
        self.closed = False
        self.waiting: deque[Answer] = deque()
        self.running: list[Answer] = []
        self.fill_batches = False
        self._load, self._max_batch, self._failed = load, max_batch, failed
        self._queue_changed = threading.Condition()

    @property
    def status(self) -> str:
        """ "loading", "ready" or "stopping"."""
        if self.closed:
            return "stopping"
        return "loading" if self.chat is None else "ready"

    def submit(self, answers: list[Answer]) -> None:
        """Put answers into the queue. If the batcher is closed, they end at once."""
        with self._queue_changed:
            if self.closed:
                for answer in answers:
                    answer.end("error")
                return
            self.waiting.extend(answers)
            self._queue_changed.notify()

    def cancel(self, answers: list[Answer]) -> None:
        """End answers that are waiting or running; those that have ended stay unchanged."""
        with self._queue_changed:
            for answer in answers:
                answer.end("cancelled")
            self.waiting = deque(answer for answer in self.waiting if not answer.finish)

    def close(self, seconds: float = 5) -> None:
        """End all answers: waiting ones with an error, running ones at their current length.

        This waits up to `seconds` for the thread. Loading cannot be interrupted; meanwhile `is_alive()` stays True.
        """
        with self._queue_changed:
            self.closed = True
            for answer in self.waiting:
                answer.end("error")
            for answer in self.running:
                answer.end("length")
            self.waiting.clear()
            self._queue_changed.notify()
        if self.is_alive() and self.chat:
            self.join(seconds)

    def run(self) -> None:
        """Load the model, then generate batches until the batcher is closed."""
        try:
            chat = self._load()
        except BaseException as error:  # reported by the thread that made this batcher
            self.failure = error
            self._failed()
            return
        self.fill_batches = chat.device.type == "cuda"
        self.chat = chat
        while batch := self._next_batch():
            try:
                self._generate(batch)
            except Exception:
                logging.exception("A batch of %d failed.", len(batch))
            self.running = []
            for answer in batch:
                answer.end("error")  # unless it has ended

    def _next_batch(self) -> list[Answer]:
        """The answers to generate next, or an empty list if the batcher is closed."""
        batch: list[Answer] = []
        with self._queue_changed:
            while not (batch or self.closed):  # a second time if all answers were cancelled in the meantime
                self._queue_changed.wait_for(lambda: self.waiting or self.closed)
                self._queue_changed.wait_for(
                    lambda: len(self.waiting) >= self._max_batch or self.closed, timeout=GATHER_SECONDS
                )
                while self.waiting and len(batch) < self._max_batch and self._fits([*batch, self.waiting[0]]):
                    batch.append(self.waiting.popleft())
                    batch[-1].started = True
            self.running = batch
        return batch

    def _fits(self, batch: list[Answer]) -> bool:
        """True if the longest prompt and the longest answer of a batch fit into the context window together."""
        longest = max(answer.prompt.num_tokens for answer in batch) + max(answer.max_tokens for answer in batch)
        return len(batch) == 1 or longest <= self.chat.window()

    @torch.inference_mode()
    def _generate(self, batch: list[Answer]) -> None:
        model, device = self.chat.model, self.chat.device
        fill = self._max_batch - len(batch) if self.fill_batches and len(batch) > 1 else 0
        max_tokens = max(answer.max_tokens for answer in batch)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            sampler = RowSampler(
                [answer.sampling for answer in batch] + [RowSampling(temperature=0)] * fill, max_tokens, device
            )
            shortest = MinNewTokens(
                model.tokenizer, *[(answer.min_tokens, answer.stops) for answer in batch], *[(0, [])] * fill
            )
            context, mask = model.context([answer.prompt.text for answer in batch], self._images(batch))
            context, mask = (torch.cat([rows, *[rows[-1:]] * fill]) for rows in (context, mask))
            continue_embeds(
                model.llama_model, model.tokenizer, context, mask, stop="",
                criteria=[partial(_add_tokens, batch, fill)], processors=[shortest, sampler],
                decoding_loop=self.chat.decoding_loop, max_new_tokens=max_tokens,
                min_new_tokens=min(answer.min_tokens for answer in batch),
            )  # fmt: skip

    def _images(self, batch: list[Answer]) -> list[torch.Tensor]:
        """The embeddings [1,Q,D] of each answer's images, in order. A prompt of several answers is encoded once."""
        prompts = list({id(answer.prompt): answer.prompt for answer in batch}.values())
        pixels = [image for prompt in prompts for image in prompt.pixels]
        starts = range(0, len(pixels), IMAGES_AT_ONCE)
        groups = [torch.stack(pixels[n : n + IMAGES_AT_ONCE]).to(self.chat.device) for n in starts]
        encoded = iter([image for group in groups for image in self.chat.model.encode_img(group)[0].split(1)])
        images = {id(prompt): [next(encoded) for _ in prompt.pixels] for prompt in prompts}
        return [image for answer in batch for image in images[id(answer.prompt)]]


def _add_tokens(batch: list[Answer], fill: int, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
    """Stopping criterion that adds each row's new token to its answer. A row is done when its answer has ended.

    The last `fill` rows belong to no answer and are done from the start.
    """
    for answer, token in zip(batch, input_ids[: len(batch), -1].tolist(), strict=True):
        answer.add_token(token)
    done = [answer.finish is not None for answer in batch] + [True] * fill
    return torch.tensor(done, device=input_ids.device)
