"""The queue, and the one thread that owns the model: answers that wait together are generated together.

The thread takes what waits, in order, up to the batch size, and generates it as one left-padded batch; what arrives
meanwhile waits for the next one. Each answer has its own sampling, stop texts, length and deadline.

Q query tokens per image, D width of the language model.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from minigpt4.conversation import Chat
from minigpt4.models.generation import StopOnText, answer_text, continue_embeds, end_ids
from minigpt4.serving.sampling import RowSampler, RowSampling

IMAGES_AT_ONCE = 16


@dataclass(frozen=True, eq=False)
class Prompt:
    """What the model reads: a text with image slots, its images [3,H,W] in order, and how many tokens that makes."""

    text: str
    pixels: list[torch.Tensor]
    num_tokens: int


class Answer:
    """An answer that is waited for.

    `ids` are its tokens so far; `finish` is None until it has ended, then "stop", "length", "cancelled" or "error".

    Args:
        stops: texts that end it.
        label: what the model may repeat in front of it ("Assistant:"), which is left out.
        deadline: `time.monotonic()` at which it ends wherever it is.
        changed: called by the model's thread when there is news.
    """

    def __init__(
        self,
        tokenizer,
        prompt: Prompt,
        sampling: RowSampling,
        max_tokens: int,
        stops: list[str],
        label: str,
        deadline: float,
        changed: Callable[[], None] = lambda: None,
    ):
        self.prompt, self.sampling, self.max_tokens, self.deadline = prompt, sampling, max_tokens, deadline
        self.ids: list[int] = []
        self.begun = False
        self.finish: str | None = None
        self._tokenizer, self._stops, self._label, self._changed = tokenizer, stops, label, changed
        self._stop, self._ends = StopOnText(tokenizer, *stops), end_ids(tokenizer)

    def take(self, token: int) -> None:
        """Add a token, and end where it says so."""
        if self.finish:
            return
        self.ids.append(token)
        if token in self._ends or self._stop.reached(self.ids):
            self.end("stop")
        elif len(self.ids) >= self.max_tokens or time.monotonic() > self.deadline:
            self.end("length")
        else:
            self._changed()

    def end(self, finish: str) -> None:
        if not self.finish:
            self.finish = finish
            self._changed()

    def text(self) -> str:
        """The answer so far. Each text begins with the one before: unlike on the page, what was sent stays sent.

        So a repeated label is left out in front only.
        """
        complete = self.finish is not None
        text = answer_text(self._tokenizer, list(self.ids), self._stops, complete=complete)
        if not complete and self._label.startswith(text):
            return ""
        return text.removeprefix(self._label).lstrip()


class Batcher:
    """Owns the model: loads it in a thread of its own, then answers there.

    Args:
        load: makes the `Chat`.
        max_batch: most answers at a time.
        window: seconds to wait for company before a batch begins.
        fixed_size: fill up batches of several answers to `max_batch` rows; None: on a GPU, where each size of a batch
            needs graphs of its own (`fast/decoding/loop.py`), and a row more costs next to nothing.
        failed: called when `load` raises; the exception is then in `failure`.
    """

    def __init__(
        self,
        load: Callable[[], Chat],
        max_batch: int,
        window: float = 0.01,
        fixed_size: bool | None = None,
        failed: Callable[[], None] = lambda: None,
    ):
        self.chat: Chat | None = None
        self.failure: BaseException | None = None
        self.closed = False
        self.running: list[Answer] = []
        self.max_batch = max_batch
        self._load, self._window, self._fixed_size, self._failed = load, window, fixed_size, failed
        self._waiting: deque[Answer] = deque()
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        self._thread.start()

    def submit(self, answers: list[Answer]) -> None:
        """Put answers into the queue; when this is closed, they end at once."""
        with self._news:
            if self.closed:
                for answer in answers:
                    answer.end("error")
                return
            self._waiting.extend(answers)
            self._news.notify()

    def cancel(self, answers: list[Answer]) -> None:
        """Forget answers, waiting or running; those that have ended stay as they are."""
        with self._news:
            for answer in answers:
                answer.end("cancelled")
            self._waiting = deque(answer for answer in self._waiting if not answer.finish)

    def close(self, seconds: float = 5) -> None:
        """End: what waits is given up, what is being written ends where it is. Waits `seconds` for that.

        Loading cannot be ended: `is_alive` tells whether it goes on.
        """
        with self._news:
            self.closed = True
            for answer in self._waiting:
                answer.end("error")
            for answer in self.running:
                answer.end("length")
            self._waiting.clear()
            self._news.notify()
        if self.is_alive and self.chat:
            self._thread.join(seconds)

    def _work(self) -> None:
        try:
            self.chat = self._load()
        except BaseException as error:  # whoever started this server says what happened
            self.failure = error
            self._failed()
            return
        while batch := self._next_batch():
            try:
                self._generate(batch)
            except Exception:
                logging.exception("A batch of %d failed.", len(batch))
            self.running = []
            for answer in batch:
                answer.end("error")  # unless it has ended

    def _next_batch(self) -> list[Answer]:
        """The answers to generate next; none: this batcher was closed."""
        batch: list[Answer] = []
        with self._news:
            while not (batch or self.closed):  # what waited may have been cancelled while it waited for company
                self._news.wait_for(lambda: self._waiting or self.closed)
                self._news.wait_for(lambda: len(self._waiting) >= self.max_batch or self.closed, timeout=self._window)
                while self._waiting and len(batch) < self.max_batch and self._fits([*batch, self._waiting[0]]):
                    batch.append(self._waiting.popleft())
                    batch[-1].begun = True
            self.running = batch
        return batch

    def _fits(self, batch: list[Answer]) -> bool:
        """Does the longest prompt with the longest answer fit into the model's window? Rows end together."""
        longest = max(answer.prompt.num_tokens for answer in batch) + max(answer.max_tokens for answer in batch)
        return len(batch) == 1 or longest <= self.chat.window()

    @torch.inference_mode()
    def _generate(self, batch: list[Answer]) -> None:
        model, device = self.chat.model, self.chat.device
        fixed_size = device.type == "cuda" if self._fixed_size is None else self._fixed_size
        fill = self.max_batch - len(batch) if fixed_size and len(batch) > 1 else 0
        max_tokens = max(answer.max_tokens for answer in batch)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            sampler = RowSampler(
                [answer.sampling for answer in batch] + [RowSampling(temperature=0)] * fill, max_tokens, device
            )
            context, mask = model.context([answer.prompt.text for answer in batch], self._images(batch))
            context, mask = (torch.cat([rows, *[rows[-1:]] * fill]) for rows in (context, mask))
            continue_embeds(
                model.llama_model, model.tokenizer, context, mask, stop="", criteria=[_Watch(batch, fill)],
                processors=[sampler], decoding_loop=self.chat.decoding_loop,
                max_new_tokens=max_tokens, min_new_tokens=1,
            )  # fmt: skip

    def _images(self, batch: list[Answer]) -> list[torch.Tensor]:
        """The vectors [1,Q,D] of each answer's images, in order; answers to one prompt share the work."""
        prompts = list({id(answer.prompt): answer.prompt for answer in batch}.values())
        pixels = [image for prompt in prompts for image in prompt.pixels]
        starts = range(0, len(pixels), IMAGES_AT_ONCE)
        groups = [torch.stack(pixels[n : n + IMAGES_AT_ONCE]).to(self.chat.device) for n in starts]
        encoded = iter([image for group in groups for image in self.chat.model.encode_img(group)[0].split(1)])
        images = {id(prompt): [next(encoded) for _ in prompt.pixels] for prompt in prompts}
        return [image for answer in batch for image in images[id(answer.prompt)]]


class _Watch:
    """Stopping criterion that hands each row's new token to its answer; a row is done when its answer has ended.

    The `fill` rows after those of the batch are nobody's.
    """

    def __init__(self, batch: list[Answer], fill: int):
        self._batch, self._fill = batch, [True] * fill

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        tokens = input_ids[: len(self._batch), -1].tolist()
        for answer, token in zip(self._batch, tokens, strict=True):
            answer.take(token)
        done = [answer.finish is not None for answer in self._batch]
        return torch.tensor(done + self._fill, device=input_ids.device)
