"""Numbers and texts in messages, and the encoding of text files."""

import codecs
from collections.abc import Sequence

# Longest first: the mark of UTF-32 begins with that of UTF-16.
MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}
MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def encoding_of(content: bytes) -> str:
    """The encoding of a text file by its byte-order mark; without one, UTF-8."""
    return next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8-sig")


def pluralize(count: int, one: str, several: str | None = None) -> str:
    """`1 file`, `2 files`, `1,500 steps`; `several`: a plural that is not `one` with an s."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def printable(text: str) -> str:
    """A user's text with escapes in place of control characters, which could forge lines of a log."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def listed(items: Sequence[str], most: int, between: str = ", ", more: str = " and {} more") -> str:
    """At most so many of the items, and how many more there are."""
    return between.join(items[:most]) + (more.format(len(items) - most) if len(items) > most else "")
