"""Choosing the next token, with the options of transformers' `generate` that a decoding loop supports.

B batch, T new tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The defaults of `continue_embeds`.
DEFAULTS = {"do_sample": False, "max_new_tokens": 300}
# The defaults of transformers' `generate`, for options that neither the caller nor the model's folder sets.
NEUTRAL = {
    "min_new_tokens": 0,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}
# Entries of a model's generation_config.json that do not concern the choice of a token, or that DEFAULTS overrides.
IGNORED = {
    "_from_model_config",
    "bos_token_id",
    "eos_token_id",
    "max_length",
    "pad_token_id",
    "transformers_version",
    "use_cache",
}


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
