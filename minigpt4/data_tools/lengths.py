"""How long a conversation is for the model, and what of it is cut."""

from typing import NamedTuple

from minigpt4.common.config import Config
from minigpt4.common.facts import IMAGE_SLOT, SEPARATOR
from minigpt4.common.schema import MiniGPT4Config
from minigpt4.datasets.conversations.batch import Conversation, Conversations, Tokens, encode, exchanges
from minigpt4.models.prompt import IGNORE_INDEX, read_prompts
from minigpt4.models.template import resolve
from minigpt4.models.tokenizer import load_tokenizer

WHOLE = 1 << 40  # a max_txt_len that cuts nothing


class Length(NamedTuple):
    length: int
    """Tokens after the first question, which `max_txt_len` bounds; or characters."""
    lost: int = 0
    """Of these, the ones that are cut off."""
    has_labels: bool = True
    broken_up: bool = False
    """Whether markers of the prompt in its texts are broken up."""


class Characters:
    """Counts characters, where no config names a tokenizer."""

    unit, max_txt_len = "character", None

    def measure(self, conversation: Conversation) -> Length:
        return Length(sum(len(part or "") for _, parts in conversation for part in parts))


class ModelTokens:
    """Counts the tokens of a config's tokenizer in its template."""

    unit = "token"

    def __init__(self, model_cfg: MiniGPT4Config) -> None:
        """Raises ConfigError for a template or tokenizer that cannot be read."""
        self.template = resolve(model_cfg)
        prompts = read_prompts(model_cfg.prompt_path, self.template.prompt) if model_cfg.prompt_path else [IMAGE_SLOT]
        self.image_prompt, self.max_txt_len = prompts[0], model_cfg.max_txt_len
        self.tokenizer = load_tokenizer(model_cfg.llama_model, model_cfg.trust_remote_code)
        self.num_query_tokens = model_cfg.num_query_token

    def measure(self, conversation: Conversation) -> Length:
        separators = [self.template.end, SEPARATOR]
        (sound,) = Conversations([conversation]).sanitize(self.tokenizer.special_tokens, separators)
        tokens, length = self._encode(sound, WHOLE)
        lost = 0
        if length > self.max_txt_len:
            tokens, kept = self._encode(sound, self.max_txt_len)
            lost = length - kept
        has_labels = any(label != IGNORE_INDEX for label in tokens.labels)
        return Length(length, lost, has_labels, tuple(sound) != tuple(conversation))

    def _encode(self, conversation: Conversation, max_txt_len: int) -> tuple[Tokens, int]:
        """The tokens, and how many of them come after the first question."""
        parts = exchanges(conversation, self.template, self.image_prompt)
        tokens = encode(self.tokenizer, parts, self.num_query_tokens, max_txt_len, self.template.bos)
        first = next((place for place, label in enumerate(tokens.labels) if label != IGNORE_INDEX), len(tokens.labels))
        return tokens, len(tokens.ids) - first


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
