"""How long a conversation is for the model, and what of it is cut."""

from dataclasses import replace
from typing import NamedTuple

from minigpt4.common.config import Config
from minigpt4.common.facts import IMAGE_SLOT
from minigpt4.common.schema import MiniGPT4Config
from minigpt4.datasets.conversations.batch import Conversation, Conversations
from minigpt4.datasets.preview import TextReader
from minigpt4.models.prompt import IGNORE_INDEX, encode_batch, sanitize_batch
from minigpt4.models.tokenizer import load_tokenizer

WHOLE = 1 << 40  # a max_txt_len that cuts nothing


class Length(NamedTuple):
    """The length of a conversation, in the unit of its measure."""

    length: int
    """Tokens after the first question, which `max_txt_len` bounds; or characters."""
    lost: int = 0
    """Of these, the ones that are cut off."""
    has_labels: bool = True
    broken_up: bool = False
    """Whether markers of the prompt in its texts are broken up."""


class Characters:
    """Counts characters, where no config names a tokenizer."""

    unit, max_txt_len, reader = "character", None, None

    def measure(self, conversation: Conversation) -> Length:
        return Length(sum(len(part or "") for _, parts in conversation for part in parts))


class ModelTokens:
    """Counts the tokens of a config's tokenizer in its template."""

    unit = "token"

    def __init__(self, model_cfg: MiniGPT4Config) -> None:
        """Raises ConfigError for a template or a file of prompts that cannot be used."""
        tokenizer = load_tokenizer(model_cfg.llama_model, model_cfg.trust_remote_code)
        self.reader = TextReader.from_config(model_cfg, tokenizer)
        self.max_txt_len = model_cfg.max_txt_len

    def measure(self, conversation: Conversation) -> Length:
        tokenizer, separators = self.reader.tokenizer, self.reader.template.separators
        texts, broken_up = sanitize_batch(Conversations([conversation]), tokenizer, separators)
        labels = whole = self._labels(texts, WHOLE)
        if len(whole) > self.max_txt_len:
            labels = self._labels(texts, self.max_txt_len)
        return Length(len(whole), len(whole) - len(labels), bool(labels), bool(broken_up))

    def _labels(self, texts: Conversations, max_txt_len: int) -> list[int]:
        """The labels after the first question; none if nothing is learnt."""
        reader = self.reader
        prompt = reader.prompts[0] if reader.prompts else IMAGE_SLOT
        labels = encode_batch(reader.tokenizer, texts, prompt, replace(reader, max_txt_len=max_txt_len)).labels[0]
        first = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))
        return labels[first:]


def lengths_of(cfg: Config | None) -> tuple[Characters | ModelTokens, str]:
    """The measure of a config, and a sentence that says why it counts characters; empty: it counts tokens.

    Raises ConfigError for a template or a file of prompts that cannot be used.
    """
    reason = ""
    if cfg is None:
        reason = "no --cfg-path names the model whose tokens could be counted"
    elif cfg.model_cfg.get("arch") != MiniGPT4Config.arch:
        reason = f"model.arch={cfg.model_cfg.get('arch')} has a form of its own"
    elif missing := list(cfg.missing_paths(False, ("model.llama_model",))):
        reason = f"model.llama_model = {missing[0][1]}"
    if reason:
        return Characters(), f"Lengths are in characters: {reason}."
    return ModelTokens(MiniGPT4Config.from_section(cfg.model_cfg)), ""
