"""An answer and its prompt, as the queue and the model's thread see them."""

import math
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from minigpt4.conversation import Decoding
from minigpt4.models.generation import StopOnText, answer_text, end_ids
from minigpt4.models.sampling import MinNewTokens
from minigpt4.models.tokenizer import Tokenizer
from minigpt4.serving.sampling import RowSampling


@dataclass(frozen=True, eq=False)
class Prompt:
    """A text with image placeholders, its images in order, and its length in tokens, images included.

    An image is a processed picture [3,H,W], or its embeddings [1,Q,D].
    """

    text: str
    images: list[torch.Tensor]
    num_tokens: int


@dataclass(eq=False)
class Answer:
    """An answer that is waiting, being generated, or complete.

    Attributes:
        stops: texts that end the answer.
        label: a text that models repeat at the beginning of an answer ("Assistant:"), and which is removed.
        deadline: time (`time.monotonic()`) at which the answer ends at its current length.
        min_tokens: neither a token nor a stop text ends the answer before it has so many tokens.
        client: who asked. The clients get equal shares; None: nobody else's.
        changed: called by the model's thread after each token and at the end.
        ids: the token ids so far.
        started: True once the model's thread has taken it up.
        finish: None until the answer has ended, then "stop", "length", "cancelled" or "error".
        error: why it ended with "error".
        first_token_at: time (`time.monotonic()`) of the first token.
        number: a random number from 0 to below 1 that decides on the next token. Each token has one, however often it
            is chosen.
    """

    tokenizer: Tokenizer
    prompt: Prompt
    sampling: RowSampling
    max_tokens: int
    stops: list[str]
    label: str = ""
    deadline: float = math.inf
    min_tokens: int = Decoding.min_length
    client: str | None = None
    changed: Callable[[], None] = lambda: None
    ids: list[int] = field(default_factory=list)
    started: bool = False
    finish: str | None = None
    error: Exception | None = None
    first_token_at: float | None = None

    def __post_init__(self) -> None:
        self.stops = [stop for stop in self.stops if stop]
        self._stop = StopOnText(self.tokenizer, *self.stops) if self.stops else None
        self._ends = end_ids(self.tokenizer)
        self.shortest = MinNewTokens(self.tokenizer, (self.min_tokens, self.stops))
        self._random = random.Random(self.sampling.seed)
        self.number = self._random.random()
        self._news, self._turn_start = threading.Event(), 0

    def begin_turn(self) -> None:
        """Called when the model's thread takes the answer up, perhaps not for the first time."""
        self.started, self._turn_start = True, len(self.ids)

    @property
    def turn_ids(self) -> list[int]:
        """The token ids since then."""
        return self.ids[self._turn_start :]

    def add_token(self, token: int) -> None:
        """Append a token, and end the answer if the token, a stop text, the length or the deadline requires it."""
        if self.finish:
            return
        self.ids.append(token)
        self.number = self._random.random()
        self.first_token_at = self.first_token_at or time.monotonic()
        if token in self._ends or (self._stop and self._stop.reached(self.ids)):
            self.end("stop")
        elif len(self.ids) >= self.max_tokens or time.monotonic() > self.deadline:
            self.end("length")
        else:
            self._tell()

    def end(self, finish: str, error: Exception | None = None) -> None:
        """End the answer, unless it has already ended."""
        if not self.finish:
            self.error, self.finish = error, finish
            self._tell()

    def _tell(self) -> None:
        self._news.set()
        self.changed()

    def wait(self, seconds: float) -> bool:
        """Wait until the answer has changed since the last call, or the time is over. Returns whether it has."""
        changed = self._news.wait(seconds)
        self._news.clear()
        return changed

    def text(self) -> str:
        """The text so far. Each text begins with the previous one, because text that was sent cannot be changed.

        For this reason the label is removed only at the beginning, unlike in `Chat`.
        """
        complete = self.finish is not None
        text = answer_text(self.tokenizer, list(self.ids), self.stops, complete=complete)
        if not complete and self.label.startswith(text):
            return ""
        return text.removeprefix(self.label).lstrip()
