"""Conversations of a training batch: messages with images become sequences of tokens with labels.

A conversation is ((role, parts), …): the roles are [system,] user, assistant, user, assistant, …, and the parts of a
message are texts, and None where an image stands. The images of a batch are in the order of these places.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from minigpt4.models import prompt
from minigpt4.models.prompt import IGNORE_INDEX, IMAGE_ID, IMAGE_SLOT
from minigpt4.models.template import Template, join_parts

if TYPE_CHECKING:
    from minigpt4.models.tokenizer import Tokenizer

Conversation = Sequence[tuple[str, Sequence[str | None]]]


class Tokens(NamedTuple):
    """The tokens of a conversation. `ids` and `labels` have the same length; labels are not shifted."""

    ids: list[int]
    labels: list[int]
    num_images: int
    """Images whose vectors are in `ids`: the first ones of the conversation."""
    cut: bool
    """Whether the conversation was longer."""


def exchanges(conversation: Conversation, template: Template, image_prompt: str) -> Iterator[tuple[str, str]]:
    """(the text before an answer, the answer with its end), with image slots.

    image_prompt: is the text before the answer to a first question that is an image alone.
    """
    found = template.exchanges([(role, join_parts(parts)) for role, parts in conversation])
    role, parts = conversation[0]
    if role == "user" and [*parts] == [None]:
        yield image_prompt, next(found)[1]
    yield from found


def encode(tokenizer: "Tokenizer", parts: Iterable[tuple[str, str]], settings: prompt.TextSettings) -> Tokens:
    """`<s>` if the template asks for it, then each question and its answer. Only the tokens of answers have labels.

    With `learn_on="all"`, those of later questions have labels, too, except for images.

    At most `max_txt_len` tokens follow the first question. A later question is kept as a whole, with its images and at
    least one token of its answer; otherwise the conversation ends before it.

    parts: as from `exchanges`.
    """
    ids, labels, room, num_images = [], [], settings.max_txt_len, 0
    for number, (question, answer) in enumerate(parts):
        bos = settings.bos and number == 0
        question_ids = prompt.encode_with_images(tokenizer, question, settings.num_query_tokens, bos)
        room -= len(question_ids) if number else 0
        if room < 1:
            return Tokens(ids, labels, num_images, cut=True)
        answer_ids = tokenizer.encode(answer)
        learnt = answer_ids[:room]
        num_images += question.count(IMAGE_SLOT)
        ids += question_ids + learnt
        asked = question_ids if number and settings.learn_on == "all" else [IGNORE_INDEX] * len(question_ids)
        labels += [IGNORE_INDEX if i == IMAGE_ID else i for i in asked] + learnt
        room -= len(learnt)
        if len(learnt) < len(answer_ids):
            return Tokens(ids, labels, num_images, cut=True)
    return Tokens(ids, labels, num_images, cut=False)


class Conversations(list[Conversation]):
    """The "text_input" of a batch of conversations, in the place of a list of captions. `MiniGPT4` uses it."""

    def sanitize(self, special_tokens: Collection[str], separators: list[str]) -> "Conversations":
        """The conversations with the markers of the prompt broken up in their texts (`prompt.sanitize`)."""

        def sanitized(part: str | None) -> str | None:
            return part if part is None else prompt.sanitize([part], special_tokens, separators)[0]

        return Conversations(tuple((role, tuple(map(sanitized, parts))) for role, parts in each) for each in self)

    @staticmethod
    def select_images(samples: dict, seen: list[bool]) -> dict:
        """The batch with the images at which `seen` is true, and with what belongs to them."""
        if all(seen):
            return samples
        kept = torch.tensor(seen).nonzero().flatten()
        per_image = [key for key in samples if key.startswith("image") and isinstance(samples[key], torch.Tensor)]
        return {**samples, **{key: samples[key][kept.to(samples[key].device)] for key in per_image}}

    def training_sequences(
        self, tokenizer: "Tokenizer", image_prompt: str, settings: prompt.TextSettings
    ) -> prompt.Sequences:
        """The tokens of each conversation; see `exchanges` and `encode`."""
        template = settings.template
        found = [encode(tokenizer, exchanges(each, template, image_prompt), settings) for each in self]
        counts = [sum(parts.count(None) for _, parts in each) for each in self]
        seen = [
            number < tokens.num_images for tokens, count in zip(found, counts, strict=True) for number in range(count)
        ]
        ids, labels = [tokens.ids for tokens in found], [tokens.labels for tokens in found]
        return prompt.Sequences(ids, labels, sum(tokens.cut for tokens in found), seen)
