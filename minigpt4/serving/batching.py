"""The queue of answers, and the thread that owns the model and generates them.

The thread computes up to `max_batch` answers together (`together.py`). A waiting answer joins the running ones as soon
as there is room. If there is none for long, a running answer gives way, and goes on later where it was. Each answer has
its own sampling, stop texts, length and deadline.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import torch

from minigpt4.conversation import Chat, Decoding
from minigpt4.serving.answer import Answer, Prompt
from minigpt4.serving.sampling import RowSampling
from minigpt4.serving.together import AnswersAlone, AnswersTogether, answers_for

POLL_SECONDS = 0.05  # how often `stream` asks whether to stop
TURN_TOKENS = 128  # after so many tokens, an answer gives way to one that waits


class Batcher(threading.Thread):
    """The thread that loads the model and generates answers.

    The endpoint and the page, or both at once, use it in their process:

        batcher = Batcher(lambda: load_chat(cfg, device), max_batch=8)
        batcher.start()
        …  # until batcher.status is "ready"
        answer = Answer(tokenizer, Prompt(text, images, num_tokens), RowSampling(seed=1), max_tokens=100, stops=["###"])
        batcher.submit([answer])
        while not answer.finish:
            answer.wait(1)
            shown = answer.text()  # so far
        batcher.cancel([answer])  # at any time

    With `chat.batcher = batcher`, `Chat.stream_answer` and `Chat.answer` are computed by it, in any number of threads.

    Attributes:
        chat: None until the model is loaded.
        failure: the exception that `load` raised.
        closed: True after `close`.
        waiting: the answers in the queue.
        running: the answers that are being computed.

    Args:
        load: makes the `Chat`.
        max_batch: maximum number of answers at a time.
        failed: called after `load` has raised an exception.
    """

    def __init__(self, load: Callable[[], Chat], max_batch: int, failed: Callable[[], None] = lambda: None):
        super().__init__(name="model", daemon=True)
        self.chat: Chat | None = None
        self.failure: BaseException | None = None
        self.closed = False
        self.waiting: list[Answer] = []
        self.running: list[Answer] = []
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
                    answer.end("error", _stopping())
                return
            self.waiting.extend(answers)
            self._queue_changed.notify()

    def cancel(self, answers: list[Answer]) -> None:
        """End answers that are waiting or running; those that have ended stay unchanged."""
        with self._queue_changed:
            for answer in answers:
                answer.end("cancelled")
            self.waiting = [answer for answer in self.waiting if not answer.finish]

    def place(self, answer: Answer) -> int:
        """The place of an answer in the queue, from 1; 0 once it has started."""
        with self._queue_changed:
            waiting = [each for each in self.waiting if not each.started]
            return waiting.index(answer) + 1 if answer in waiting else 0

    def stream(
        self,
        prompt: str,
        images: list[torch.Tensor],
        decoding: Decoding,
        stop: str,
        should_stop: Callable[[], bool] = lambda: False,
        in_line: Callable[[int], None] = lambda place: None,
    ) -> Iterator[tuple[list[int], bool]]:
        """Yield (the new ids so far, False) whenever there are more, then (all of them, True).

        The answer ends early if `should_stop()` is true or this iterator is closed. Raises what made it fail.

        Args:
            images: one for each place in the prompt, as in `Prompt`.
            decoding: with one beam.
            in_line: called with `place` whenever it has changed.
        """
        chat, asked = self.chat, Prompt(prompt, images, self.chat.num_tokens(prompt))
        answer = Answer(
            chat.model.tokenizer, asked, RowSampling.of(decoding), decoding.max_new_tokens, [stop],
            min_tokens=decoding.min_length,
        )  # fmt: skip
        self.submit([answer])
        shown = 0
        try:
            while not answer.finish:
                if (place := self.place(answer)) != shown:
                    in_line(place)
                    shown = place
                if should_stop():
                    self.cancel([answer])
                elif answer.wait(POLL_SECONDS) and answer.ids:
                    yield list(answer.ids), False
            if answer.finish == "error":
                raise answer.error
            yield list(answer.ids), True
        finally:
            self.cancel([answer])

    def close(self, seconds: float = 5) -> None:
        """End all answers: those that have not started with an error, the others at their current length.

        This waits up to `seconds` for the thread. Loading cannot be interrupted; meanwhile `is_alive()` stays True.
        """
        with self._queue_changed:
            self.closed = True
            for answer in (*self.waiting, *self.running):
                if answer.started:
                    answer.end("length")
                else:
                    answer.end("error", _stopping())
            self.waiting.clear()
            self._queue_changed.notify()
        if self.is_alive() and self.chat:
            self.join(seconds)

    def run(self) -> None:
        """Load the model, then generate answers until the batcher is closed."""
        try:
            chat = self._load()
            with _gpu_of(chat), torch.no_grad():
                answers = answers_for(chat, self._max_batch)
        except BaseException as error:  # reported by the thread that made this batcher
            self.failure = error
            self._failed()
            return
        self.chat = chat
        with _gpu_of(chat), torch.no_grad():
            while self._wait_for_work(answers):
                answers.round(self._take, self._give_way)
                with self._queue_changed:
                    self._places()

    def _wait_for_work(self, answers: AnswersTogether | AnswersAlone) -> bool:
        """Wait until there is an answer to compute. Returns False if the batcher is closed."""
        with self._queue_changed:
            self._queue_changed.wait_for(lambda: self.waiting or answers.busy or self.closed)
            return not self.closed

    def _take(self) -> Answer | None:
        """The next answer to compute: the longest waiting one of the clients with the fewest running answers."""
        with self._queue_changed:
            running = self._places()
            answer = min(self.waiting, key=lambda answer: running[_client(answer)], default=None)
            if answer:
                self.waiting.remove(answer)
                answer.begin_turn()
                self.running.append(answer)
            return answer

    def _give_way(self) -> Answer | None:
        """A running answer that goes back into the queue, since others wait and no place is free; None: nobody's.

        It is one of the client with the most places, if that has two more than a client that waits, else one that has
        had TURN_TOKENS while another client waits.
        """
        with self._queue_changed:
            running = self._places()
            candidates = [answer for answer in self.running if answer.turn_ids]
            if not (self.waiting and candidates) or len(self.running) < self._max_batch:
                return None
            fewest = min(running[_client(answer)] for answer in self.waiting)
            answer = max(candidates, key=lambda answer: (running[_client(answer)], len(answer.turn_ids)))
            if running[_client(answer)] < fewest + 2:
                answer = max(candidates, key=lambda answer: len(answer.turn_ids))
                others = any(_client(each) != _client(answer) for each in self.waiting)
                if len(answer.turn_ids) < TURN_TOKENS or not others:
                    return None
            self.running.remove(answer)
            self.waiting.append(answer)
            return answer

    def _places(self) -> Counter:
        """How many running answers each client has, without those that have ended."""
        self.running = [answer for answer in self.running if not answer.finish]
        return Counter(map(_client, self.running))


def _client(answer: Answer) -> str | int:
    return id(answer) if answer.client is None else answer.client


def _gpu_of(chat: Chat):
    return torch.cuda.device(chat.device) if chat.device.type == "cuda" else nullcontext()


def _stopping() -> RuntimeError:
    return RuntimeError("The server is stopping.")
