"""Sampling with settings for each row, so that any requests can share a batch.

B batch, V vocabulary.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from pydantic import BaseModel, Field

from minigpt4.conversation.decoding import Decoding

GREEDY_BELOW = 0.01


class RowSampling(BaseModel):
    """The sampling settings of an answer. A temperature below GREEDY_BELOW means the likeliest token."""

    temperature: float = Field(default=Decoding.temperature, ge=0, le=2)
    top_p: float = Field(default=Decoding.top_p, ge=0, le=1)
    top_k: int = Field(default=Decoding.top_k, ge=0, le=2**31)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtracted from a token's score for each of its occurrences in the answer."""
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    """Subtracted from a token's score if it occurs in the answer."""
    repetition_penalty: float = Field(default=Decoding.repetition_penalty, gt=0, le=10)
    """Not OpenAI's; that of transformers and vLLM, over the tokens of the answer."""
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalizes(self) -> bool:
        return bool(self.frequency_penalty or self.presence_penalty) or self.repetition_penalty != 1

    @classmethod
    def of(cls, decoding: Decoding) -> "RowSampling":
        """The same for the settings of a chat, which have been checked."""
        names = ["top_p", "top_k", "repetition_penalty", "seed"]
        temperature = decoding.temperature if decoding.do_sample else 0.0
        return cls.model_construct(temperature=temperature, **{name: getattr(decoding, name) for name in names})


@dataclass(eq=False)
class RowChoice:
    """What the next token of a row depends on, beside its scores.

    Attributes:
        ids: the new tokens so far.
        number: a random number from 0 to below 1.
    """

    sampling: RowSampling
    ids: list[int]
    number: float


def choose(scores: torch.Tensor, rows: list[RowChoice]) -> torch.Tensor:
    """The next tokens [B] int64 for scores [B,V] float32, which are changed.

    A row's token depends on nothing but its own scores and choice. A GPU is never waited for.
    """
    for row, score in zip(rows, scores, strict=True):
        if row.sampling.penalizes and row.ids:
            _penalize(score, row)
    if all(row.sampling.greedy for row in rows):
        return scores.argmax(dim=-1)
    settings = [
        [1.0, 1.0, 1.0, row.number]
        if row.sampling.greedy
        else [row.sampling.temperature, row.sampling.top_p, row.sampling.top_k or 2**31, row.number]
        for row in rows
    ]
    temperature, top_p, top_k, number = to_device(settings, scores).split(1, dim=1)  # [B,1] each
    probs, tokens = (scores / temperature).softmax(dim=1).sort(dim=1, descending=True, stable=True)
    probs = probs * (torch.arange(probs.shape[1], device=probs.device) < top_k)
    keep = probs.cumsum(dim=1) - probs < top_p * probs.sum(dim=1, keepdim=True)
    keep[:, 0] = True
    mass = (probs * keep).cumsum(dim=1)
    place = (mass <= number * mass[:, -1:]).sum(dim=1, keepdim=True)
    place = place.minimum(keep.sum(dim=1, keepdim=True) - 1)  # rounding can lead past the last token
    return tokens.gather(1, place).squeeze(1)


def _penalize(score: torch.Tensor, row: RowChoice) -> None:
    """Change the scores [V] of the tokens that the answer has already."""
    counts = Counter(row.ids)
    tokens, numbers = to_device([*counts], score, torch.long), to_device([*counts.values()], score)
    before, repetition = score[tokens], row.sampling.repetition_penalty
    before = torch.where(before < 0, before * repetition, before / repetition)
    score[tokens] = before - row.sampling.frequency_penalty * numbers - row.sampling.presence_penalty


def to_device(values: list, like: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values as a tensor on the device of another, which goes on with its work meanwhile."""
    made = torch.tensor(values, dtype=dtype)
    return made.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else made.to(like.device)
