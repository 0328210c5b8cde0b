"""Decoding settings: how the tokens of an answer are chosen."""

from dataclasses import dataclass

from minigpt4.common.settings import check_bounds, setting


@dataclass(frozen=True)
class Decoding:
    """The settings of an answer. Raises ValueError if one is out of bounds."""

    max_new_tokens: int = setting(300, "most tokens of an answer", at_least=1)
    num_beams: int = setting(1, "beams of the beam search; 1: no beam search", at_least=1)
    """Beam search (more than one) is slower and cannot be streamed."""
    min_length: int = setting(1, "fewest tokens of an answer", at_least=0, at_most="max_new_tokens")
    """Neither an end token nor the separator ends the answer before it has so many tokens."""
    top_p: float = setting(
        0.9, "sample from the likeliest tokens that together have this probability", more_than=0, at_most=1
    )
    top_k: int = setting(50, "sample from this many of the likeliest tokens; 0: from all", at_least=0)
    """The first release used 50, transformers' default."""
    temperature: float = setting(1.0, "below 1: likelier tokens are favoured")
    repetition_penalty: float = setting(1.0, "above 1: fewer repetitions", more_than=0)
    length_penalty: float = setting(1.0, "with beams: above 0 favours long answers")
    seed: int | None = setting(None, "makes sampling repeatable", at_least=0, at_most=2**63 - 1)
    """Repeatable only if nothing else uses torch's generator at the same time."""
    max_length: int = setting(2000, at_least=2)
    """Maximum length of conversation and answer together, in tokens."""
    do_sample: bool = setting(True)
    """Sample if True; else take the likeliest token (or beam)."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            fix = "For the likeliest answer set do_sample=False."
            raise ValueError(f"temperature={self.temperature!r} must be more than 0. {fix}")
        check_bounds(self)

    def options(self) -> dict:
        """The settings as keyword arguments of transformers' `generate`."""
        names = ["max_new_tokens", "num_beams", "repetition_penalty", "do_sample"]
        if self.do_sample:
            names += ["temperature", "top_p", "top_k"]
        if self.num_beams > 1:
            names.append("length_penalty")
        return {"min_new_tokens": self.min_length} | {name: getattr(self, name) for name in names}
