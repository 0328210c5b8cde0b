"""Random access to the records of a text file, by the bytes where each begins and ends.

The text stays in the file. A dataset of a million records takes 24 MB, which data workers share. Pictures may be
embedded in the text, so a file can be far larger than the memory.
"""

import codecs
import csv
import importlib
import io
import json
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, BinaryIO

import numpy as np

from minigpt4.common.errors import ConfigError
from minigpt4.common.text import encoding_of

JSON_OPEN, JSON_NEXT = re.compile(r"[ \t\r\n]*\[[ \t\r\n]*"), re.compile(r"[ \t\r\n]*([,\]]?)[ \t\r\n]*")

Span = tuple[int, int, int]  # first byte, end, line (from 1)

# The largest field of a table: it may be a picture as a data: URL. Python's own limit is 128 KiB.
csv.field_size_limit(1 << 30)

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlist = 30


def optional(module: str, package: str, purpose: str) -> Any:
    """A module of an optional package. Raises ConfigError that says what needs it and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(
            f"{purpose} needs the package {package}, which is not installed: pip install {package}"
        ) from None


def shown(value: Any) -> str:
    """A value for a message, cut to some 60 characters a text and 200 in all."""
    text = _short.repr(value)
    return text if len(text) <= 200 else text[:200] + "…"


def decode(content: bytes) -> str:
    """Text in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark. Raises ConfigError for others."""
    encoding = encoding_of(content)
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        place = max(0, error.start - 20)
        raise ConfigError(
            f"is not text in {encoding.removesuffix('-sig').upper()}: {shown(content[place : error.end + 20])}. Save "
            "it in UTF-8; for one in Latin-1: iconv -f LATIN1 -t UTF-8 OLD > NEW"
        ) from None


class TextFile:
    """The bytes of a text file in UTF-8. Files in UTF-16 or UTF-32 with a byte-order mark are recoded in memory."""

    def __init__(self, path: str) -> None:
        """Raises ConfigError if the file is not in the encoding that its mark announces, without one UTF-8."""
        self.path = path
        self._recoded: bytes | None = None
        with open(path, "rb") as file:
            self._modified = os.fstat(file.fileno()).st_mtime_ns
            head = file.read(4)
            if encoding_of(head) != "utf-8-sig":
                try:
                    self._recoded = decode(head + file.read()).encode()
                except ConfigError as error:
                    raise ConfigError(f"{path} {error}") from None
            elif b"\0" in head:
                raise ConfigError(f"{path} begins with {head!r}: no text, or UTF-16 without a mark. Save it in UTF-8.")
        self.start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0

    def open(self) -> BinaryIO:
        """The file, behind its byte-order mark. Raises ConfigError if it has changed since `__init__`."""
        if self._recoded is not None:
            return io.BytesIO(self._recoded)
        file = open(self.path, "rb")
        if os.fstat(file.fileno()).st_mtime_ns != self._modified:
            file.close()
            raise ConfigError(f"{self.path} has changed since it was opened. Start the command again.")
        file.seek(self.start)
        return file

    def begin(self, size: int) -> tuple[str, str]:
        """The first `size` bytes as text, without leading blanks, and the first line of it."""
        with self.open() as file:
            text = file.read(size).decode(errors="replace").lstrip()
        return text, text.partition("\n")[0]


class TextRecords:
    """The records of a text file: bytes and line of each, and the function that parses its text."""

    def __init__(self, file: TextFile, spans: Iterable[Span], parse: Callable[[str], dict], unit: str = "line") -> None:
        """unit: how `where` counts: by the line, or "record" for several on a line."""
        self.file, self.parse, self.unit = file, parse, unit
        self.spans = np.fromiter(spans, dtype=np.dtype((np.int64, 3)))

    def __len__(self) -> int:
        return len(self.spans)

    def where(self, index: int) -> str:
        """The place of a record, for messages."""
        record = "" if self.unit == "line" else f" {self.unit} {index + 1},"
        return f"{self.file.path}{record} line {self.spans[index, 2]}"

    @contextmanager
    def reader(self, check: bool = False) -> Iterator[Callable[[int], dict]]:
        """A function that gives the parsed record at an index. Its ConfigErrors do not name the place."""
        with self.file.open() as file:

            def read(index: int) -> dict:
                start, end, _ = self.spans[index].tolist()
                file.seek(start)
                return self.parse(decode(file.read(end - start)))

            yield read


def parse_json(text: str) -> dict:
    """The object in a JSON text. Raises ConfigError for any other text."""
    try:
        item = json.loads(text)
    except ValueError as error:
        reason = f"{error.msg} (character {error.pos + 1})" if isinstance(error, json.JSONDecodeError) else error
        raise ConfigError(
            f"is not JSON: {reason}. It begins {shown(text)}. Write one record {{…}} on a line."
        ) from None
    except RecursionError:
        raise ConfigError("is JSON that is nested too deeply to be a record. Take it out.") from None
    if not isinstance(item, dict):
        raise ConfigError(f"is {shown(item)}, not a record {{…}}.")
    return item


def scan_lines(file: TextFile) -> Iterator[Span]:
    """The lines that are not blank."""
    position = file.start
    with file.open() as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield position, position + len(line), number
            position += len(line)


def scan_json_list(file: TextFile) -> Iterator[Span]:
    """The items of a JSON list. Raises ConfigError where the list is broken."""
    with file.open() as stream:
        # One character per byte. JSON's own signs are ASCII, so items end at the same places as in UTF-8.
        text = stream.read().decode("latin-1")
    scan = json.JSONDecoder().raw_decode
    index, line, counted, number = JSON_OPEN.match(text).end(), 1, 0, 0
    sign = "]" if text[index : index + 1] == "]" else ","
    while sign == ",":
        number += 1
        line += text.count("\n", counted, index)
        counted = index
        try:
            _, end = scan(text, index)
        except (ValueError, RecursionError) as error:
            place = f"{file.path} record {number}, line {getattr(error, 'lineno', line)}"
            reason = f"is not JSON: {error}" if isinstance(error, ValueError) else "is nested too deeply"
            raise ConfigError(f"{place} {reason}. Correct the list, or write one record on a line (.jsonl).") from None
        yield file.start + index, file.start + end, line
        following = JSON_NEXT.match(text, end)
        sign, index = following[1], following.end()
        if not sign or (sign == "]" and index < len(text)):
            found = shown(text[index : index + 60].encode("latin-1").decode("utf-8", errors="replace"))
            place = f"{file.path} record {number}, line {line + text.count(chr(10), counted, index)}"
            raise ConfigError(f"{place} is followed by {found}; a JSON list goes on with ',' or ends with ']'.")


class Table:
    """Cuts a CSV or TSV file into rows and parses them. Its first row names the columns."""

    def __init__(self, file: TextFile, delimiter: str) -> None:
        # The captions of Flickr30k, between |, have quotation marks of their own.
        plain = {"quoting": csv.QUOTE_NONE, "skipinitialspace": True} if delimiter == "|" else {"strict": True}
        self._dialect = {"delimiter": delimiter, **plain}
        start, end, _ = next(self._rows(file), (0, 0, 0))
        with file.open() as stream:
            stream.seek(start)
            header = decode(stream.read(end - start))
        self.columns = [name.strip() for name in self._fields(header)]

    def scan(self, file: TextFile) -> Iterator[Span]:
        """The rows below the header. Raises ConfigError for a broken one: its quotation mark is not closed."""
        return islice(self._rows(file), 1, None)

    def parse(self, text: str) -> dict[str, str]:
        """{column: field} of a row. Raises ConfigError if it has another number of fields than the header."""
        row = self._fields(text)
        if len(row) != len(self.columns):
            raise ConfigError(
                f"has {len(row)} fields; the header has {len(self.columns)} {shown(self.columns)}. Put fields "
                f"that hold {self._dialect['delimiter']!r} into quotation marks, or add what is missing. "
                f"It begins {shown(text)}."
            )
        return dict(zip(self.columns, row, strict=True))

    def _fields(self, text: str) -> list[str]:
        return next(csv.reader(io.StringIO(text, newline=""), **self._dialect), [])

    def _rows(self, file: TextFile) -> Iterator[Span]:
        start = position = file.start
        line = 1

        def lines() -> Iterator[str]:
            nonlocal position
            for each in stream:
                position += len(each)
                yield each.decode(errors="replace")  # `decode` reports it when the row is parsed

        with file.open() as stream:
            rows = csv.reader(lines(), **self._dialect)
            try:
                for row in rows:
                    if any(row):
                        yield start, position, line
                    start, line = position, rows.line_num + 1
            except csv.Error as error:
                hint = (
                    "a carriage return stands outside of quotation marks. Save it with line ends of Unix or Windows."
                    if "new-line" in str(error)
                    else f"{error}. Is a quotation mark not closed? A quotation mark inside a field is written twice: "
                    '"a ""red"" car".'
                )
                raise ConfigError(f"{file.path} line {line}: is no row of a table: {hint}") from None
