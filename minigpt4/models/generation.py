"""From a prompt's embeddings to an answer's text: captioning and chat take this one way.

Where an answer ends is decided on its text, row by row, whatever the tokenizer makes of that text. The first release
compared token ids of one tokenizer, on row 0 only.

B batch, S sequence, T new tokens, D width of the language model.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol

import torch

from minigpt4.models.sampling import DEFAULTS, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from minigpt4.models.tokenizer import Tokenizer


class StopOnText:
    """Stopping criterion for transformers' `generate`: a row is done once one of `stops` stands in its new text."""

    def __init__(self, tokenizer: "Tokenizer", *stops: str):
        self._tokenizer = tokenizer
        self._stops = stops
        # A token is at least one byte of text.
        self._tail = max(len(stop.encode()) for stop in stops) + 8

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        done = [self.reached(row) for row in input_ids[:, -self._tail :].tolist()]
        return torch.tensor(done, device=input_ids.device)

    def reached(self, ids: list[int]) -> bool:
        """Does the text of these new ids, of which the last one is news, hold one of the stops?"""
        text = self._tokenizer.decode(ids[-self._tail :], skip_special_tokens=False)
        return any(stop in text for stop in self._stops)


class StreamingCriterion:
    """Stopping criterion that passes on the ids of row 0 after each token, and ends the generation when asked to."""

    def __init__(self, show: Callable[[list[int]], None], should_stop: Callable[[], bool]):
        self._show = show
        self._should_stop = should_stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        self._show(input_ids[0].tolist())
        return torch.full((len(input_ids),), self._should_stop(), device=input_ids.device)


class DecodingLoop(Protocol):
    """A faster way to decode than transformers' `generate`: `fast.decoding.loop.cached_decoding`."""

    def supports(self, llm: "PreTrainedModel") -> bool:
        """Whether it can run this model."""

    def decode(
        self, llm: "PreTrainedModel", embeds: torch.Tensor, attention_mask: torch.Tensor, steps: int, choose: Callable
    ) -> Iterator[torch.Tensor]:
        """Yield the next ids [B] of every row, on the CPU, `steps` times or until closed."""


def continue_embeds(
    llm: "PreTrainedModel",
    tokenizer: "Tokenizer",
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    stop: str,
    criteria: Iterable = (),
    processors: Iterable = (),
    decoding_loop: DecodingLoop | None = None,
    **options: Any,
) -> torch.Tensor:
    """Continue the sequences [B,S,D], padded on the left; greedily by default.

    Args:
        attention_mask: [B,S], 0 on padding.
        stop: text that ends a row; it is part of what is returned. Empty: only the eos token ends it.
        criteria: further stopping criteria.
        processors: further logits processors, applied last.
        decoding_loop: decodes with the ids that transformers' `generate` would give. Where it is None, does not support
            the model, or the options ask for beams and the like, `generate` itself decodes.
        options: as for transformers' `generate`, for example max_new_tokens=60, num_beams=5, do_sample=True.

    Returns:
        The new token ids [B,T]; a row that ended early is filled up with the eos id.
    """
    criteria = [*([StopOnText(tokenizer, stop)] if stop else []), *criteria]
    sampling = Sampling.of(llm, options) if decoding_loop and decoding_loop.supports(llm) else None
    if sampling is None:
        with torch.inference_mode():
            return llm.generate(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                pad_token_id=tokenizer.eos_token_id,
                stopping_criteria=criteria,
                logits_processor=[*processors],
                **DEFAULTS | options,
            )
    sampling.processors += processors
    # Caches outlive this call, and inference tensors could not be written to outside of inference mode.
    with torch.inference_mode(False), torch.no_grad():
        rows = torch.full((len(inputs_embeds), sampling.max_new_tokens), tokenizer.eos_token_id)
        steps = decoding_loop.decode(llm, inputs_embeds, attention_mask, sampling.max_new_tokens, sampling.choose)
        with closing(steps):
            return _until_done(steps, rows, sampling.eos_ids, criteria)


def _until_done(steps: Iterator[torch.Tensor], rows: torch.Tensor, eos_ids: list[int], criteria: list) -> torch.Tensor:
    """Write each step's ids [B] into rows [B,T], until all rows have ended. Returns the part that was reached."""
    done, eos = torch.zeros(len(rows), dtype=torch.bool), torch.tensor(eos_ids, dtype=torch.long)
    for n, ids in enumerate(steps):
        rows[~done, n] = ids[~done]
        so_far = rows[:, : n + 1]
        done |= torch.isin(rows[:, n], eos)
        for criterion in criteria:
            done |= criterion(so_far, None)
        if done.all():
            break
    return so_far


def stream(
    run: Callable[[StreamingCriterion], torch.Tensor],
    should_stop: Callable[[], bool] = lambda: False,
    show: bool = True,
) -> Iterator[tuple[list[int], bool]]:
    """Call `run(criterion)`, which generates for one prompt with that stopping criterion, in a thread.

    Yields the new ids so far and False, and last of all those of the result of `run`, [1,T], and True. The generation
    ends early when `should_stop()` is true or this iterator is closed. Raises what `run` raises.

    Args:
        show: False: only the result; beams have no "so far".
    """
    feed: queue.SimpleQueue = queue.SimpleQueue()
    closed = threading.Event()
    criterion = StreamingCriterion(lambda ids: show and feed.put(ids), lambda: closed.is_set() or should_stop())

    def work() -> None:
        try:
            feed.put(run(criterion))
        except BaseException as error:  # handed to the reader, who would wait for ever otherwise
            feed.put(error)

    thread = threading.Thread(target=work, name="generate", daemon=True)
    thread.start()
    try:
        while isinstance(item := feed.get(), list):
            if feed.empty():  # a slow reader gets the newest ids only
                yield item, False
        if isinstance(item, BaseException):
            raise item
        yield item[0].tolist(), True
    finally:
        closed.set()
        thread.join()


def strip_leading(tokenizer: "Tokenizer", ids: list[int]) -> list[int]:
    """The ids without one unk and then one bos in front, which some models put there."""
    for special in (tokenizer.unk_token_id, tokenizer.bos_token_id):
        if ids and special is not None and ids[0] == special:
            ids = ids[1:]
    return ids


def answer_text(
    tokenizer: "Tokenizer", ids: list[int], stop: str | Iterable[str], label: str | None = None, complete: bool = True
) -> str:
    """The answer that stands in new token ids, stripped.

    It ends before `stop`, or the first of several, or before a control token other than unk and bos, such as eos. What
    precedes the last `label` ("Assistant:") goes too: models repeat it. Of an answer that is not `complete`, a tail
    that may become `stop` or `label`, or half a character, is held back.
    """
    stops = [text for text in ([stop] if isinstance(stop, str) else stop) if text]
    ids, ends = strip_leading(tokenizer, ids), end_ids(tokenizer)
    end = next((n for n, i in enumerate(ids) if i in ends), len(ids))
    text = tokenizer.decode(ids[:end], skip_special_tokens=False)
    stopped = min((text.find(stop) for stop in stops if stop in text), default=None)
    if not complete and stopped is None:
        text = text.rstrip("\ufffd")
        text = text[: len(text) - max(_overlap(text, marker) for marker in (*stops, label or ""))]
    text = text[:stopped]
    return (text.split(label)[-1] if label else text).strip()


def end_ids(tokenizer: "Tokenizer") -> set[int]:
    """The control tokens that end an answer: all but unk and bos."""
    return set(tokenizer.special_tokens.values()) - {tokenizer.unk_token_id, tokenizer.bos_token_id}


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that `marker` begins with, short of the whole."""
    return next((n for n in range(len(marker) - 1, 0, -1) if text.endswith(marker[:n])), 0)
