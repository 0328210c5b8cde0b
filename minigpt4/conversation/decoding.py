"""Decoding settings: how the tokens of an answer are chosen."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoding:
    """The settings of an answer. Raises ValueError if one is out of bounds."""

    max_new_tokens: int = 300
    """Maximum length of an answer in tokens."""
    num_beams: int = 1
    """Number of beams. Beam search (more than one) is slower and cannot be streamed."""
    min_length: int = 1
    """Minimum length of an answer in tokens."""
    top_p: float = 0.9
    """Sample from the likeliest tokens whose probabilities add up to this."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that are already in the answer become less likely."""
    length_penalty: float = 1.0
    """With beam search: a value above 0 favours long answers, a value below 0 short ones."""
    temperature: float = 1.0
    """A value below 1 favours likely tokens; a value above 1 favours unlikely ones."""
    max_length: int = 2000
    """Maximum length of conversation and answer together, in tokens."""
    do_sample: bool = True
    """Sample if True; else take the likeliest token (or beam)."""
    top_k: int = 50
    """Number of likeliest tokens to sample from; 0 means all. The first release used 50, transformers' default."""
    seed: int | None = None
    """Makes sampling repeatable, provided that nothing else uses torch's generator at the same time."""

    def __post_init__(self) -> None:
        bounds = {
            "max_new_tokens": (1, None),
            "num_beams": (1, None),
            "min_length": (0, self.max_new_tokens),
            "top_p": (0, 1),
            "max_length": (2, None),
            "top_k": (0, None),
        }
        if self.seed is not None:
            bounds["seed"] = (0, 2**63 - 1)
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value < low or (high is not None and value > high):
                limit = f"at least {low}" if high is None else f"from {low} to {high}"
                raise ValueError(f"{name}={value!r} must be {limit}.")
        for name in ("temperature", "top_p", "repetition_penalty"):
            if not getattr(self, name) > 0:
                fix = " For the likeliest answer set do_sample=False." if name == "temperature" else ""
                raise ValueError(f"{name}={getattr(self, name)!r} must be more than 0.{fix}")

    def options(self) -> dict:
        """The settings as keyword arguments of transformers' `generate`."""
        options = {
            "max_new_tokens": self.max_new_tokens,
            "min_new_tokens": self.min_length,
            "num_beams": self.num_beams,
            "repetition_penalty": self.repetition_penalty,
            "do_sample": self.do_sample,
        }
        if self.do_sample:
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        if self.num_beams > 1:
            options["length_penalty"] = self.length_penalty
        return options
