"""A conversation about pictures, as a user's file has it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Picture:
    """The place of a picture in a message."""

    source: str | bytes
    """An absolute path, or the content of the picture's file."""


@dataclass(frozen=True)
class Message:
    """Texts, unchanged, and pictures, in their order. Pictures stand in the messages of the user only."""

    role: str
    """ "system", "user" or "assistant"."""
    parts: tuple[str | Picture, ...]


@dataclass(frozen=True)
class Record:
    """A conversation: perhaps a system text, then question and answer in turn."""

    messages: tuple[Message, ...]
    id: str
    """The record's own id, or a hash of its content. It does not change when other records are added."""
    where: str
    """Its place, for messages: `my.jsonl line 12`, `00003.tar member 000123`."""

    @property
    def pictures(self) -> list[str | bytes]:
        """The sources of its pictures, in order."""
        return [part.source for message in self.messages for part in message.parts if isinstance(part, Picture)]
