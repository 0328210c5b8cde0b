"""From a prompt's embeddings to an answer's text, for captioning and chat.

The end of an answer is found in its decoded text, row by row, with any tokenizer. The first release compared token ids
of one tokenizer, on row 0 only.

B batch, S sequence, T new tokens, D width of the language model.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any, Protocol

import torch

from minigpt4.models.sampling import DEFAULTS, MinNewTokens, Sampling
from minigpt4.models.tokenizer import Tokenizer, end_ids, strip_leading

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StopOnText:
    """Stopping criterion for transformers' `generate`: a row ends when its new text contains one of `stops`."""

    def __init__(self, tokenizer: Tokenizer, *stops: str):
        self._tokenizer = tokenizer
        self._stops = stops
        # A token is at least one byte of text.
        self._tail = max(len(stop.encode()) for stop in stops) + 8

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        done = [self.reached(row) for row in input_ids[:, -self._tail :].tolist()]
        return torch.tensor(done, device=input_ids.device)

    def reached(self, ids: list[int]) -> bool:
        """Whether the text of these new ids contains one of the stops, given that it did not before the last id."""
        text = self._tokenizer.decode(ids[-self._tail :], skip_special_tokens=False)
        return any(stop in text for stop in self._stops)


class DecodingLoop(Protocol):
    """Decodes faster than transformers' `generate`; `fast.decoding.loop.cached_decoding` is one."""

    def supports(self, llm: "PreTrainedModel") -> bool:
        """Whether the loop can run this model."""

    def decode(
        self, llm: "PreTrainedModel", embeds: torch.Tensor, attention_mask: torch.Tensor, steps: int, choose: Callable
    ) -> Iterator[torch.Tensor]:
        """Yield the next ids [B] of all rows, on the CPU, `steps` times or until closed."""


def continue_embeds(
    llm: "PreTrainedModel",
    tokenizer: Tokenizer,
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
        stop: text that ends a row; the returned ids include it. Empty: only the eos token ends a row.
        criteria: further stopping criteria.
        processors: further logits processors, applied last.
        decoding_loop: decodes with the ids that transformers' `generate` would give. `generate` itself decodes if the
            loop is None, if it does not support the model, or if an option needs `generate`, such as beams.
        options: as for transformers' `generate`, for example max_new_tokens=60, num_beams=5, do_sample=True.
            `min_new_tokens` counts the tokens before `stop`, too.

    Returns:
        The new token ids [B,T]; a row that ended early is filled up with the eos id.
    """
    criteria = [*([StopOnText(tokenizer, stop)] if stop else []), *criteria]
    least = options.get("min_new_tokens")
    first = [MinNewTokens(tokenizer, (least, [stop]))] if least and stop else []
    sampling = Sampling.of(llm, options) if decoding_loop and decoding_loop.supports(llm) else None
    if sampling is None:
        return llm.generate(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            pad_token_id=tokenizer.eos_token_id,
            stopping_criteria=criteria,
            logits_processor=[*first, *processors],
            **DEFAULTS | options,
        )
    sampling.processors = [*first, *sampling.processors, *processors]
    # KV caches outlive this call, and inference tensors cannot be written to outside of inference mode.
    with torch.inference_mode(False), torch.no_grad():
        rows = torch.full((len(inputs_embeds), sampling.max_new_tokens), tokenizer.eos_token_id)
        steps = decoding_loop.decode(llm, inputs_embeds, attention_mask, sampling.max_new_tokens, sampling.choose)
        with closing(steps):
            return _until_done(steps, rows, sampling.eos_ids, criteria)


def _until_done(steps: Iterator[torch.Tensor], rows: torch.Tensor, eos_ids: list[int], criteria: list) -> torch.Tensor:
    """Write each step's ids [B] into rows [B,T] until all rows have ended, and return the columns that were written."""
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
    run: Callable[[Callable], torch.Tensor], should_stop: Callable[[], bool] = lambda: False, show: bool = True
) -> Iterator[tuple[list[int], bool]]:
    """Call `run(criterion)` in a thread. It generates for one prompt with that further stopping criterion.

    Yields (the new ids so far, False) after each token, then (the ids of the result of `run`, [1,T], True). The
    generation ends early if `should_stop()` is true or this iterator is closed. Raises what `run` raises.

    Args:
        show: False: yield only the result. Beams have no "ids so far".
    """
    feed: queue.SimpleQueue = queue.SimpleQueue()
    closed = threading.Event()

    def criterion(input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        if show:
            feed.put(input_ids[0].tolist())
        return torch.full((len(input_ids),), closed.is_set() or should_stop(), device=input_ids.device)

    def work() -> None:
        try:
            feed.put(run(criterion))
        except BaseException as error:  # passed to the reader, who would wait forever otherwise
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


def answer_text(
    tokenizer: Tokenizer, ids: list[int], stop: str | Iterable[str], label: str | None = None, complete: bool = True
) -> str:
    """The answer in new token ids, stripped.

    It ends before the first occurrence of `stop` (one text or several), or before a control token other than unk and
    bos, such as eos. Models repeat `label` ("Assistant:"): the text up to the last one is left out. If the answer is
    not `complete`, its end is left out as long as it can become `stop`, `label` or a whole character.
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


def _overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` that is a beginning of `marker`, but not all of it."""
    return next((n for n in range(len(marker) - 1, 0, -1) if text.endswith(marker[:n])), 0)
