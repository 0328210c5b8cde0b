"""Text to token ids, a segment at a time, and back.

The published weights were trained with SentencePiece's own segmentation, in which each segment starts with the dummy
prefix "▁". SentencePiece itself is used if a model's folder has `tokenizer.model` or a .gguf file has its vocabulary.
transformers 5's tokenizer of the same file gives other ids for segments such as " ###". It is used for other models.
"""

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from minigpt4.common import facts
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.models import llm


class Tokenizer(Protocol):
    """Converts a text to token ids and back. `encode` adds no special tokens."""

    bos_token_id: int | None
    eos_token_id: int
    unk_token_id: int | None
    special_tokens: dict[str, int]
    """{text: id} of the texts that are read as one special token each, such as `</s>`."""

    def __len__(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...


def strip_leading(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The ids without one leading unk and then one leading bos, which some models write."""
    for special in (tokenizer.unk_token_id, tokenizer.bos_token_id):
        if ids and special is not None and ids[0] == special:
            ids = ids[1:]
    return ids


def end_ids(tokenizer: Tokenizer) -> set[int]:
    """The control tokens that end an answer: all but unk and bos."""
    return set(tokenizer.special_tokens.values()) - {tokenizer.unk_token_id, tokenizer.bos_token_id}


def load_tokenizer(llama_model: str, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a language model's folder, hub id or .gguf file.

    trust_remote_code: run the Python files that come with it. Without, a ConfigError is raised if it needs them.
    """
    from transformers.utils import cached_file

    if facts.is_gguf(llama_model):
        model = registry.get("llm_file", ".gguf").sentencepiece_model(llama_model)
        return SentencePieceTokenizer(model_proto=model) if model else HuggingFaceTokenizer(llama_model)
    name, options = llm.pretrained_source(llama_model)
    model_file, added_file = (
        cached_file(name, file, _raise_exceptions_for_missing_entries=False, **options)
        for file in ("tokenizer.model", "added_tokens.json")
    )
    if model_file:
        return SentencePieceTokenizer(model_file, added_file)
    return HuggingFaceTokenizer(llama_model, trust_remote_code)


def chat_template(llama_model: str, trust_remote_code: bool = False) -> tuple[Callable[[list[dict]], str], str]:
    """The chat template of a language model's tokenizer and the text of its end token, for `from_chat_template`.

    Raises ConfigError if it has no chat template; the function does if the template fails.
    """
    from transformers import AutoTokenizer

    tokenizer = llm.from_pretrained(AutoTokenizer, llama_model, trust_remote_code)
    if not tokenizer.chat_template:
        raise ConfigError(f"model.template=auto: {llama_model} has no chat template. Give a name or a mapping.")

    def render(messages: list[dict]) -> str:
        asked = messages[-1]["role"] == "user"
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked)
        except Exception as error:  # jinja's, and any that the template's own expressions raise
            fails = f"the chat template of {llama_model} fails ({type(error).__name__}: {error})"
            raise ConfigError(f"model.template=auto: {fails}. Give a name or a mapping.") from error

    return render, tokenizer.eos_token


class HuggingFaceTokenizer:
    """transformers' tokenizer, which adds no special tokens here."""

    def __init__(self, llama_model: str, trust_remote_code: bool = False):
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        # AutoTokenizer would read a .gguf file's vocabulary once more, for a config, to come to the same class.
        kind = PreTrainedTokenizerFast if facts.is_gguf(llama_model) else AutoTokenizer
        self._tokenizer = llm.from_pretrained(kind, llama_model, trust_remote_code)
        self.bos_token_id: int | None = self._tokenizer.bos_token_id
        self.eos_token_id: int = self._tokenizer.eos_token_id
        self.unk_token_id: int | None = self._tokenizer.unk_token_id
        added = self._tokenizer.added_tokens_decoder.items()
        self.special_tokens: dict[str, int] = {token.content: i for i, token in added if token.special}
        if self.eos_token_id is None:
            raise ConfigError(f"The tokenizer of {llama_model} has no end-of-sequence token, which pads batches.")

    def __len__(self) -> int:
        """The number of token ids, added ones included."""
        return len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


class SentencePieceTokenizer:
    """SentencePiece with `tokenizer.model`. A text is first split at special tokens (`</s>` is id 2)."""

    def __init__(self, model_file: str | None = None, added_file: str | None = None, model_proto: bytes | None = None):
        """added_file: added_tokens.json, in which Vicuna v0 has a pad token; model_proto: a model file's content."""
        from sentencepiece import SentencePieceProcessor

        self._model = SentencePieceProcessor(model_file=model_file, model_proto=model_proto)
        self.bos_token_id: int | None = self._model.bos_id()
        self.eos_token_id: int = self._model.eos_id()
        self.unk_token_id: int | None = self._model.unk_id()
        control = {i for i in range(len(self._model)) if self._model.IsControl(i) or self._model.IsUnknown(i)}
        self.special_tokens: dict[str, int] = {self._model.IdToPiece(i): i for i in control}
        if added_file:
            self.special_tokens |= json.loads(Path(added_file).read_text(encoding="utf-8"))
        self._special_text = {i: text for text, i in self.special_tokens.items()}
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def __len__(self) -> int:
        """The number of token ids, added ones included."""
        return len(self._model) + sum(i >= len(self._model) for i in self.special_tokens.values())

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for segment in self._split.split(text):
            if segment in self.special_tokens:
                ids.append(self.special_tokens[segment])
            elif segment:
                ids.extend(self._model.encode(segment))
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        if skip_special_tokens:
            return self._model.decode([i for i in ids if i not in self._special_text])
        runs = itertools.groupby(ids, key=self._special_text.get)
        return "".join(self._model.decode(list(run)) if text is None else text * len(list(run)) for text, run in runs)
