"""Texts with image slots become token ids and labels, for training and for chat.

A text is split at each `<ImageHere>`, an image slot, and at each BOUNDARY. Each segment is tokenised by itself. A slot
becomes as many positions as an image has vectors. `<s>` comes first, once.

B batch, S sequence, Q query tokens per image, D width of the language model.
"""

import copy
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch.nn.utils.rnn import pad_sequence

from minigpt4.common.facts import IMAGE_SLOT

if TYPE_CHECKING:
    from minigpt4.models.template import Template
    from minigpt4.models.tokenizer import Tokenizer

# The id at the positions of image vectors, until the vectors replace it.
IMAGE_ID = -1
# Separates two segments of a text; no text of a user or of a dataset has it.
BOUNDARY = "\x1e"
# The label of positions without a loss.
IGNORE_INDEX = -100


@dataclass(frozen=True)
class TextSettings:
    """The settings of a model that decide how its texts become tokens."""

    num_query_tokens: int
    """Positions of an image."""
    max_txt_len: int
    """Most tokens of a text, or of a conversation after its first question."""
    end_sym: str
    """The end of a text. A conversation has that of its template."""
    template: "Template | None" = None
    learn_on: str = "answers"
    """Which texts of a conversation have labels: "answers", or "all" after its first question."""

    @property
    def bos(self) -> bool:
        """Whether `<s>` comes first, if the tokenizer has one."""
        return self.template is None or self.template.bos


class Batch(Protocol):
    """Token ids for one pass of the language model: a `PaddedBatch`, or a micro-batch of `fast/packing/batch.py`."""

    input_ids: torch.Tensor
    """[B,S] int64, 0 where an image vector belongs."""
    targets: torch.Tensor
    """[B,K] int64: the token after each of the K positions whose logits are computed, or IGNORE_INDEX."""

    def insert(self, embeds: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """The embeddings [B,S,D] with the image vectors [images * Q,D] at their positions."""

    def llm_inputs(self) -> dict:
        """The language model's other arguments, in addition to the embeddings."""


@dataclass
class PaddedBatch:
    """Sequences of token ids, padded to one length. All tensors are int64."""

    input_ids: torch.Tensor
    """[B,S], 0 where an image vector belongs."""
    image_positions: torch.Tensor
    """[images * Q] these positions, counted through all rows."""
    attention_mask: torch.Tensor
    """[B,S], 0 on padding."""
    labels: torch.Tensor
    """[B,S], not shifted: IGNORE_INDEX at positions without a loss."""

    def __post_init__(self) -> None:
        labels = self.labels[:, 1:]
        # [K] the positions whose logits a row needs. Prompts and images have no labels.
        self.logits_to_keep = (labels != IGNORE_INDEX).any(dim=0).nonzero().flatten()
        # [B,K] the tokens after these positions, IGNORE_INDEX if a row has no label there.
        self.targets = labels[:, self.logits_to_keep]
        self.num_labels = int((labels != IGNORE_INDEX).sum())
        self.num_tokens, self.num_image_vectors = int(self.attention_mask.sum()), len(self.image_positions)

    def insert(self, embeds: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """The embeddings [B,S,D] with the image vectors [images * Q,D] at their positions."""
        return embeds.flatten(0, 1).index_copy(0, self.image_positions, vectors).view_as(embeds)

    def llm_inputs(self) -> dict:
        """The language model's other arguments in training, in addition to the embeddings [B,S,D].

        Padding is on the right, after all labels, so causal attention needs no mask.
        """
        return {"logits_to_keep": self.logits_to_keep}

    def to(self, device: torch.device, non_blocking: bool = False) -> "PaddedBatch":
        moved = copy.copy(self)
        for name, value in self._tensors():
            setattr(moved, name, value.to(device, non_blocking=non_blocking))
        return moved

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        for _, value in self._tensors():
            value.record_stream(stream)

    def _tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [(name, value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)]


def break_up(text: str, markers: Iterable[str]) -> str:
    """`text` with a space after the first character of each marker in it: "###" becomes "# ##", "</s>" "< /s>"."""
    for marker in dict.fromkeys(marker.strip() for marker in markers):
        while len(marker) > 1 and marker in text:
            text = text.replace(marker, f"{marker[0]} {marker[1:]}")
    return text


def sanitize_batch(texts: Sequence, tokenizer: "Tokenizer", separators: list[str]) -> tuple[Sequence, list[str]]:
    """`sanitize` for the texts of a batch, or its conversations, which know how (`datasets.conversations.batch`).

    Also returns the beginnings of those that were changed.
    """
    sanitized = getattr(texts, "sanitize", functools.partial(sanitize, [*texts]))(tokenizer.special_tokens, separators)
    return sanitized, [str(text)[:60] for text, other in zip(texts, sanitized, strict=True) if text != other]


def sanitize(texts: list[str], special_tokens: Iterable[str], separators: list[str]) -> list[str]:
    """Texts of users or datasets in which separators, image slots and special tokens are broken up by a space.

    A space also follows a text that ends like the beginning of a separator, which it would become part of.
    """
    markers = (*separators, IMAGE_SLOT, *special_tokens)
    beginnings = tuple(marker[0] for marker in map(str.strip, separators) if len(marker) > 1)
    has_marker = _any_of(markers).search
    texts = [text.replace(BOUNDARY, " ") for text in texts]
    sanitized = [break_up(text, markers) if has_marker(text) else text for text in texts]
    return [text + " " if text.endswith(beginnings) else text for text in sanitized]


@functools.lru_cache
def _any_of(markers: tuple[str, ...]) -> re.Pattern:
    return re.compile("|".join(re.escape(marker) for marker in map(str.strip, markers) if len(marker) > 1))


def encode_with_images(tokenizer: "Tokenizer", text: str, num_query_tokens: int, bos: bool = True) -> list[int]:
    """`<s>`, if `bos` is true and the tokenizer has it, and the token ids of `text`.

    IMAGE_ID replaces each image slot `num_query_tokens` times.
    """
    ids = [tokenizer.bos_token_id] if bos and tokenizer.bos_token_id is not None else []
    for number, between in enumerate(text.split(IMAGE_SLOT)):
        ids += [IMAGE_ID] * num_query_tokens if number else []
        for segment in between.split(BOUNDARY):
            ids += tokenizer.encode(segment)
    return ids


class Sequences(NamedTuple):
    """The tokens of a training batch before they are collated."""

    ids: list[list[int]]
    """Token ids of each sequence, with IMAGE_ID where image vectors belong."""
    labels: list[list[int]]
    """Of the same lengths, not shifted: IGNORE_INDEX at positions without a loss."""
    num_cut: int
    """Texts that were too long and have lost their end."""
    images_seen: list[bool] | None = None
    """For each image of the batch, whether its vectors are in the sequences. None: all are."""


def encode_batch(tokenizer: "Tokenizer", texts: Sequence, image_prompt: str, settings: TextSettings) -> Sequences:
    """The tokens of a batch's texts, or of its conversations, which know how.

    Of each text: `<s>` if the template asks for it, `image_prompt` with the image, the text, `end_sym`. Only tokens of
    the text and of `end_sym` have labels, and at most `max_txt_len` of them are kept. The eos token has none, as in the
    first release, unless `end_sym` has it.
    """
    if hasattr(texts, "training_sequences"):
        return texts.training_sequences(tokenizer, image_prompt, settings)
    end_sym = settings.end_sym
    prefix = encode_with_images(tokenizer, image_prompt, settings.num_query_tokens, settings.bos)
    ignored = None if tokenizer.eos_token_id in tokenizer.encode(end_sym) else tokenizer.eos_token_id
    sequences, labels, num_cut = [], [], 0
    for text in texts:
        ids = tokenizer.encode(text + end_sym)
        num_cut += len(ids) > settings.max_txt_len
        ids = ids[: settings.max_txt_len]
        sequences.append(prefix + ids)
        labels.append([IGNORE_INDEX] * len(prefix) + [IGNORE_INDEX if i == ignored else i for i in ids])
    return Sequences(sequences, labels, num_cut)


def generation_batch(tokenizer: "Tokenizer", prompts: list[str], settings: TextSettings) -> PaddedBatch:
    """Prompts to be continued, padded on the left, so that all of them end at the same position."""
    number, bos = settings.num_query_tokens, settings.bos
    sequences = [encode_with_images(tokenizer, prompt, number, bos) for prompt in prompts]
    labels = [[IGNORE_INDEX] * len(sequence) for sequence in sequences]
    return pad(sequences, labels, tokenizer.eos_token_id, side="left")


def pad(sequences: list[list[int]], labels: list[list[int]], pad_id: int, side: str = "right") -> PaddedBatch:
    """A batch of sequences, with IMAGE_ID where image vectors belong, and their labels, padded to the longest."""

    def padded(rows: list[list[int]], value: int) -> torch.Tensor:
        tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
        return pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=side)

    ids = padded(sequences, pad_id)
    return PaddedBatch(
        input_ids=ids.masked_fill(ids == IMAGE_ID, 0),
        image_positions=(ids == IMAGE_ID).flatten().nonzero().flatten(),
        attention_mask=padded([[1] * len(s) for s in sequences], 0),
        labels=padded(labels, IGNORE_INDEX),
    )
