"""How an answer is drawn from the model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Decoding:
    """The settings of an answer. Raises ValueError for one that is out of bounds."""

    max_new_tokens: int = 300
    """Most tokens of an answer."""
    num_beams: int = 1
    """Answers pursued side by side; more than one is slower and cannot be streamed."""
    min_length: int = 1
    """Fewest tokens of an answer."""
    top_p: float = 0.9
    """Sample from the likeliest tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Above 1: tokens of the answer so far become less likely."""
    length_penalty: float = 1.0
    """With beams: above 0 favours long answers, below 0 short ones."""
    temperature: float = 1.0
    """Below 1: likelier tokens are favoured; above 1: less so."""
    max_length: int = 2000
    """Most tokens of conversation and answer together."""
    do_sample: bool = True
    """Sample; False: always the likeliest token (or beam)."""
    top_k: int = 50
    """Sample from at most so many tokens; 0: from all. The first release used 50 without saying so."""
    seed: int | None = None
    """Makes sampling repeatable, as long as nothing else draws from torch's generator meanwhile."""

    def __post_init__(self) -> None:
        bounds = {
            "max_new_tokens": (1, None),
            "num_beams": (1, None),
            "min_length": (0, self.max_new_tokens),
            "top_p": (0, 1),
            "repetition_penalty": (0, None),
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
        """As keyword arguments of transformers' `generate`."""
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
