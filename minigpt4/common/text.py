"""Numbers and texts in messages."""

from collections.abc import Sequence


def pluralize(count: int, one: str, several: str | None = None) -> str:
    """`1 file`, `2 files`, `1,500 steps`; `several`: a plural that is not `one` with an s."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def printable(text: str) -> str:
    """A user's text with escapes in place of control characters, which could forge lines of a log."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def listed(items: Sequence[str], most: int, between: str = ", ", more: str = " and {} more") -> str:
    """At most so many of the items, and how many more there are."""
    return between.join(items[:most]) + (more.format(len(items) - most) if len(items) > most else "")
