"""A question with its references, and an answer to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from minigpt4.datasets.conversations.batch import Conversation


@dataclass(frozen=True)
class Example:
    """A question about pictures and the answers that people gave."""

    id: str
    """Unique among the examples of an evaluation."""
    messages: "Conversation"
    """(role, parts) up to the question; parts are texts, and None where a picture stands."""
    references: tuple[str, ...]
    pictures: "tuple[str | bytes | Callable[[], torch.Tensor], ...]" = ()
    """For each None in `messages`: a path, the content of a file, or a function that returns the processed picture."""
    names: Mapping[str, str] = field(default_factory=dict)
    """{key: value}: how a line of a file of answers may name this example, as in {"image_id": "42"}."""
    group: str = ""
    """Examples of a group get figures of their own, beside those of all examples."""
    choices: tuple[str, ...] = ()
    """The answers to choose from."""
    merged: tuple[str, ...] = ()
    """Ids of equal questions, whose references are among these."""

    def __str__(self) -> str:
        return self.id

    @property
    def question(self) -> str:
        """The text of the question; empty for a picture alone."""
        return " ".join(part.strip() for part in self.messages[-1][1] if part)


@dataclass(frozen=True)
class Answer:
    """A model's answer. ended: the end sign was generated; None: it is not known."""

    text: str
    ended: bool | None = None
