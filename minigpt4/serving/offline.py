"""Answers about many pictures, computed together token by token, without a queue and without a thread of its own.

A place that an answer leaves is taken by the next at once, so no long answer holds the others up. Pictures are read
ahead by threads, and encoded several at a time.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from minigpt4.common.parallel import Batch
from minigpt4.conversation import Chat, Decoding
from minigpt4.models.generation import answer_text
from minigpt4.serving.answer import Answer, Prompt
from minigpt4.serving.sampling import RowSampling
from minigpt4.serving.together import AnswersTogether

ENCODED_AT_ONCE = 16  # items whose pictures are encoded together
FREE_SHARE = 8  # one place in so many must be free before answers begin: prompts are read faster together
WRITTEN_LATE = 16  # times the places: so many answers may be complete while an earlier one is not


class OfflineAnswers:
    """Answers about items, in their order.

    Args:
        chat: one for which `computes_together` is true.
        prompt: the text for a number of pictures.
        decoding: with one beam.
        places: most answers at a time.
        threads: that read items.
    """

    def __init__(self, chat: Chat, prompt: Callable[[int], str], decoding: Decoding, places: int, threads: int):
        self._chat, self._prompt, self._decoding = chat, prompt, decoding
        self._places, self._threads = places, threads
        with torch.no_grad():
            self._together = AnswersTogether(chat, places)

    @torch.no_grad()
    def batches(
        self, items: Iterable, load: Callable[[Any], tuple[str, Any]], entry: Callable[[str, int, str], dict]
    ) -> Iterator[Batch]:
        """Yield what is complete, whenever something is.

        Args:
            load: reads an item, in a thread: its name and its pictures [3,H,W], or an exception.
            entry: the line for a name, a number of pictures, and an answer.
        """
        self._ready: deque[Answer] = deque()
        self._in_order: deque[tuple[str, Answer | Exception]] = deque()
        items = iter(items)
        with ThreadPoolExecutor(self._threads) as pool:
            self._read = (pool.submit(load, item) for item in items)
            self._reading: deque[Future] = deque()
            self._read_ahead()
            while self._reading or self._in_order:
                self._together.round(self._take, lambda: None)
                if batch := self._complete(entry):
                    yield batch

    def _read_ahead(self) -> None:
        while len(self._reading) < 2 * max(self._places, ENCODED_AT_ONCE):
            if (future := next(self._read, None)) is None:
                return
            self._reading.append(future)

    def _take(self) -> Answer | None:
        free = self._places - self._together.running
        if self._together.running and free < self._places // FREE_SHARE:
            return None
        if not self._ready and len(self._in_order) < WRITTEN_LATE * self._places:
            self._encode()
        return self._ready.popleft() if self._ready else None

    def _encode(self) -> None:
        """Encode the pictures of the next items that have been read; if all before are complete, wait for one."""
        taken: list[tuple[str, list[torch.Tensor]]] = []
        while self._reading and len(taken) < ENCODED_AT_ONCE:
            if not self._reading[0].done() and (taken or self._in_order):
                break
            name, pictures = self._reading.popleft().result()
            self._read_ahead()
            taken.append((name, pictures))
        good = [pictures for _, pictures in taken if not isinstance(pictures, Exception)]
        if good:
            stacked = torch.stack([picture for pictures in good for picture in pictures]).to(self._chat.device)
            encoded = iter(self._chat.model.encode_img(stacked)[0].split(1))
        for name, pictures in taken:
            if isinstance(pictures, Exception):
                self._in_order.append((name, pictures))
                continue
            answer = self._answer([next(encoded) for _ in pictures])
            self._in_order.append((name, answer))
            self._ready.append(answer)

    def _answer(self, images: list[torch.Tensor]) -> Answer:
        model, decoding, text = self._chat.model, self._decoding, self._prompt(len(images))
        asked, sampling = Prompt(text, images, self._chat.num_tokens(text)), RowSampling.of(decoding)
        return Answer(
            model.tokenizer, asked, sampling, decoding.max_new_tokens, [model.end_sym], min_tokens=decoding.min_length
        )

    def _complete(self, entry: Callable[[str, int, str], dict]) -> Batch | None:
        """The first items that are complete; None: there are none. Raises what made an answer fail, but for memory."""
        lines, skipped, size = [], {}, 0
        while self._in_order and (isinstance(self._in_order[0][1], Exception) or self._in_order[0][1].finish):
            name, answer = self._in_order.popleft()
            size += 1
            error = answer if isinstance(answer, Exception) else answer.error
            if error is None:
                model = self._chat.model
                text = answer_text(model.tokenizer, answer.ids, model.end_sym)
                lines.append(entry(name, len(answer.prompt.images), text))
            elif error is answer or isinstance(error, torch.OutOfMemoryError):
                skipped[name] = str(error)
            else:
                raise error
        return Batch(size, lines, skipped) if size else None
