"""Sampling with settings for each row, so that any requests can share a batch.

B batch, T new tokens so far, V vocabulary.
"""

import random

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
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


class RowSampler:
    """Logits processor that samples a token for each row and sets the scores of all other tokens to -inf.

    Greedy generation then takes the sampled tokens. Each row has its own random numbers, one for each of `max_tokens`,
    so that the answer for a seed does not depend on the rest of the batch. They are computed in advance, so that a GPU
    does not wait for them.
    """

    def __init__(self, rows: list[RowSampling], max_tokens: int, device: torch.device):
        def column(values) -> torch.Tensor:
            return torch.tensor(list(values), device=device).unsqueeze(1)  # [B,1]

        self._plain = all(row.greedy and not row.frequency_penalty and not row.presence_penalty for row in rows)
        generators = [random.Random(row.seed) for row in rows]
        numbers = [[generator.random() for _ in range(max_tokens)] for generator in generators]
        self._random = torch.tensor(numbers, device=device)  # [B,max_tokens]
        self._temperature = column(1.0 if row.greedy else row.temperature for row in rows)
        self._top_p = column(row.top_p for row in rows)
        self._top_k = column(1 if row.greedy else row.top_k or 2**31 for row in rows)
        self._frequency = column(row.frequency_penalty for row in rows)
        self._presence = column(row.presence_penalty for row in rows)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The new scores [B,V]. `input_ids` [B,T] are the new tokens so far."""
        if self._plain:
            return scores
        counts = torch.zeros_like(scores).scatter_add_(1, input_ids, torch.ones_like(input_ids, dtype=scores.dtype))
        scores = scores - self._frequency * counts - self._presence * (counts > 0)
        probs, tokens = (scores / self._temperature).softmax(dim=1).sort(dim=1, descending=True, stable=True)
        probs = probs * (torch.arange(probs.shape[1], device=probs.device) < self._top_k)
        keep = probs.cumsum(dim=1) - probs < self._top_p * probs.sum(dim=1, keepdim=True)
        keep[:, 0] = True
        mass = (probs * keep).cumsum(dim=1)
        target = self._random[:, input_ids.shape[1], None] * mass[:, -1:]
        place = (mass <= target).sum(dim=1, keepdim=True)
        place = place.minimum(keep.sum(dim=1, keepdim=True) - 1)  # rounding can lead past the last token
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.gather(1, place), 0.0)
