"""Choosing the next token, with the options of transformers' `generate` that a decoding loop supports.

B batch, T new tokens, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from minigpt4.models.tokenizer import Tokenizer, end_ids, strip_leading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The defaults of `continue_embeds`.
DEFAULTS = {"do_sample": False, "max_new_tokens": 300}
# The defaults of transformers' `generate`, for options that neither the caller nor the model's folder sets.
NEUTRAL = dict(min_new_tokens=0, num_beams=1, repetition_penalty=1.0, temperature=1.0, top_k=50, top_p=1.0)
# Entries of a model's generation_config.json that do not concern the choice of a token, or that DEFAULTS overrides.
IGNORED = {"bos_token_id", "eos_token_id", "pad_token_id"}
IGNORED |= {"max_length", "use_cache", "transformers_version", "_from_model_config"}


@dataclass
class Sampling:
    """Chooses with transformers' own logits processors, in its order, so that the same seed gives the same ids."""

    max_new_tokens: int
    do_sample: bool
    eos_ids: list[int]
    processors: list

    @classmethod
    def of(cls, llm: "PreTrainedModel", options: dict) -> "Sampling | None":
        """Read options as for `generate`. Returns None if one of them needs `generate` itself, such as beams."""
        config = llm.generation_config
        known = NEUTRAL | DEFAULTS
        own = {name: value for name, value in config.to_diff_dict().items() if name in known or value}
        settings = known | {name: value for name, value in own.items() if name not in IGNORED} | DEFAULTS | options
        if set(settings) != set(known) or settings["num_beams"] != 1 or settings["max_new_tokens"] < 1:
            return None
        eos = config.eos_token_id
        eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        return cls(settings["max_new_tokens"], settings["do_sample"], eos_ids, _processors(settings, eos_ids, llm))

    def choose(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The next ids [B], from the new ids so far [B,T] and the logits [B,V] float32."""
        for processor in self.processors:
            logits = processor(ids, logits)
        if self.do_sample:
            return torch.multinomial(logits.softmax(dim=-1), num_samples=1).squeeze(1)
        return logits.argmax(dim=-1)


def _processors(settings: dict, eos_ids: list[int], llm: "PreTrainedModel") -> list:
    import transformers

    processors = []
    if settings["repetition_penalty"] != 1:
        processors.append(transformers.RepetitionPenaltyLogitsProcessor(float(settings["repetition_penalty"])))
    if settings["min_new_tokens"] and eos_ids:
        least = settings["min_new_tokens"]
        device = llm.get_input_embeddings().weight.device
        processors.append(transformers.MinNewTokensLengthLogitsProcessor(0, least, eos_ids, device=device))
    if settings["do_sample"]:
        if settings["temperature"] != 1:
            processors.append(transformers.TemperatureLogitsWarper(float(settings["temperature"])))
        if settings["top_k"]:
            processors.append(transformers.TopKLogitsWarper(settings["top_k"]))
        if settings["top_p"] < 1:
            processors.append(transformers.TopPLogitsWarper(settings["top_p"]))
    return processors


class MinNewTokens:
    """Logits processor: no row ends, by a control token or a stop text, before its answer has so many tokens.

    transformers' own processor knows the eos token only. Here the tokens that would complete a stop text are excluded,
    too, while fewer tokens lie before that text. A leading unk or bos counts only while it is alone.
    """

    def __init__(self, tokenizer: Tokenizer, *rows: tuple[int, Iterable[str]]):
        """rows: (fewest tokens, stop texts), one for each row, or a single one for all."""
        self._tokenizer, self._ends = tokenizer, sorted(end_ids(tokenizer))
        self._rows = [(least, [stop for stop in stops if stop]) for least, stops in rows]
        # As in StopOnText, a token is at least one byte of text.
        self._tail = max([len(stop.encode()) for _, stops in self._rows for stop in stops], default=0) + 8
        self.all_may_end = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The scores [B,V], -inf for excluded tokens. `input_ids` [B,T] are the new tokens so far."""
        if self.all_may_end:
            return scores
        scores, self.all_may_end = scores.clone(), True
        for row, ids in enumerate(input_ids.tolist()):
            answer = strip_leading(self._tokenizer, ids) or ids
            excluded = self._excluded(answer, *self._rows[row % len(self._rows)])
            if excluded:
                self.all_may_end = False
                columns = torch.tensor(excluded, device=scores.device)
                scores[row, columns[columns < scores.shape[1]]] = -torch.inf
        return scores

    def _excluded(self, ids: list[int], least: int, stops: list[str]) -> list[int]:
        """The tokens that may not follow the new ids of a row."""
        tail = ids[-self._tail :]
        text = self._text(tail)
        # A stop text may begin within the last of the `least` tokens, behind its first character.
        before = tail[: max(least - 1 - len(ids) + len(tail), 0)]
        earliest = len(self._text(before)) + 1 if len(ids) >= least > 0 else least and len(text) + 1
        excluded = [] if len(ids) >= least else self._ends.copy()
        for stop in stops:
            for begun in range(min(len(stop), len(text) + 1)):
                if text.endswith(stop[:begun]) and len(text) - begun < earliest:
                    excluded += completing(self._tokenizer, stop[begun:], whole=not begun)
            if text.endswith("\ufffd") and not stop.isascii():  # a character is written byte by byte
                for token in completing(self._tokenizer, "\ufffd", whole=False):
                    if 0 <= self._text([*tail, token]).find(stop) < earliest:
                        excluded.append(token)
        return excluded

    def _text(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


@lru_cache(maxsize=128)
def completing(tokenizer: Tokenizer, text: str, whole: bool) -> list[int]:
    """The tokens whose text contains `text`, if it is a `whole` stop text, else those whose text begins with it."""
    texts = token_texts(tokenizer)
    return [i for i, each in enumerate(texts) if (text in each if whole else each.startswith(text))]


@lru_cache(maxsize=2)
def token_texts(tokenizer: Tokenizer) -> list[str]:
    """The text of each token within a text. At the beginning, tokenizers drop a token's leading space."""
    first = tokenizer.encode("a")[-1:]
    start = len(tokenizer.decode(first, skip_special_tokens=False))
    return [tokenizer.decode([*first, i], skip_special_tokens=False)[start:] for i in range(len(tokenizer))]
