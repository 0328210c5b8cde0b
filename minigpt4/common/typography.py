"""Characters that a web page or an input method puts in the place of plain ones, in YAML and on the command line.

Some of the results are no YAML. Others are YAML with another meaning: `end_sym: “###”` is a text of five characters,
and `arch:mini_gpt4` on a line of its own is a text, not a key with a value.
"""

import html
import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

import yaml
from omegaconf import OmegaConf

# Full-width digits, letters and signs of YAML; quotes; dashes; bullets; spaces, and characters without a width.
PLAIN = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F) if chr(code - 0xFEE0).isalnum()}
PLAIN |= {ord(char): ord(char) - 0xFEE0 for char in "：，＃［］｛｝＂＇－．＝＋＿"}
PLAIN |= str.maketrans("﹕∶꞉︰；﹐﹑､、【】〔〕（）", "::::,,,,,[][][]")
PLAIN |= dict.fromkeys(map(ord, "「」『』“”„‟«»〝〞〟❝❞″"), '"')
PLAIN |= dict.fromkeys(map(ord, "‘’‚‛‹›❛❜′´`"), "'")
PLAIN |= dict.fromkeys(map(ord, "‐‑‒–—―−•‣◦⁃●▪"), "-")
SPACES = "\u00a0\u1680\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
PLAIN |= dict.fromkeys(map(ord, SPACES), " ")
# Soft hyphen, joiners, directions of writing, variation selectors, byte-order marks.
INVISIBLE = "\u00ad\u061c\u2060\ufe0e\ufe0f\ufeff" + "".join(
    chr(code) for start, end in ((0x200B, 0x2010), (0x202A, 0x202F), (0x2066, 0x206A)) for code in range(start, end)
)
PLAIN |= dict.fromkeys(map(ord, INVISIBLE), "")
ENTITY = re.compile(r"&(?:nbsp|ensp|emsp|quot|apos|amp|lt|gt|#\d+|#x[0-9a-f]+);", re.IGNORECASE)

# A key and its value with `:` or `=` in place of `: `, but not `pipe:cat a.tar`, `https://…` or `C:\data`.
KEY_AND_VALUE = r"(?!(?:pipe|file|data):)([a-z_][a-z0-9_]+) *(?::(?=[^\s/\\])|= *)"
ITEM = r"-(?=[A-Za-z\"'])"
QUOTED_OR_COMMENT = re.compile(r"""("(?:[^"\\]|\\.)*"|'[^']*'|(?<!\S)#.*)""")
ESCAPED_QUOTE = re.compile(r"""\\(["'])""")
DOUBLED_QUOTES = re.compile(r"""(''|"")([^\s,\]}:'"].*?)\1""")
LINE_BREAK = re.compile("\r\n|[\n\r\u0085\u2028\u2029]")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Slip(NamedTuple):
    """A place that is not as YAML needs it."""

    found: str
    needed: str
    line: int = 1

    def __str__(self) -> str:
        odd = [char for char in dict.fromkeys(self.found) if ord(char) in PLAIN]
        causes = [f"{unicodedata.name(char).lower()} U+{ord(char):04X}" for char in odd]
        causes += ["a tab"] * ("\t" in self.found) + ENTITY.findall(self.found)
        causes += ["a backslash"] * (ESCAPED_QUOTE.search(self.found) is not None)
        if not causes:
            causes = [self._cause_in_plain_text()]
        return f"{self.found!r} should be {self.needed!r} (the cause: {', '.join(causes)})"

    def _cause_in_plain_text(self) -> str:
        if self.found.startswith(("''", '""')):
            return "two quotes in a row"
        if self.found == self.needed + self.found[-1]:
            return f"{self.found[-1]!r} at the end"
        return "a missing space" if ":" in self.found or ":" not in self.needed else "no colon"


def plain(text: str) -> str:
    """The text as an English keyboard types it. Texts in quotes and comments stay as they are."""

    def typed(part: str) -> str:
        part = ENTITY.sub(lambda match: html.unescape(match[0]), part)
        return ESCAPED_QUOTE.sub(r"\1", part).translate(PLAIN)

    return _outside_quotes(typed, text)


def _outside_quotes(change: Callable[[str], str], text: str) -> str:
    """The text with its parts changed that are neither in quotes nor a comment. A quote that is not closed is none."""
    is_open = any(text.count(quote) % 2 for quote in "\"'") and not text.lstrip().startswith("#")
    parts = [text] if is_open else QUOTED_OR_COMMENT.split(text)
    return "".join(part if number % 2 else change(part) for number, part in enumerate(parts))


def slip_in_value(text: str) -> Slip | None:
    """The slip in a value: YAML would read something else than a text from it, were it typed in plain characters."""
    typed = plain(text)
    if text[-1:] in (",", ";", "，", "；", "。") and _means_more(plain(text[:-1]).strip(" ")):
        return Slip(text, plain(text[:-1]).strip(" "))
    if typed == text or (text.strip(SPACES) == text and not _means_more(typed.strip(" "))):
        return None
    return Slip(text, typed.strip(" "))


def _means_more(text: str) -> bool:
    """Whether YAML reads something else from the value of a key than the text itself."""
    try:
        value = OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)["value"]
    except Exception:  # OmegaConf raises more than yaml's errors
        return False
    return value != text and not text.startswith(("#", "-"))


def slip_in_yaml(text: str) -> Slip | None:
    """The first slip in a file that is valid YAML. Texts in quotes and comments may have any characters."""
    lines, in_lists, before = LINE_BREAK.split(text), [False], None
    for token in yaml.scan(text, LOADER):
        if isinstance(token, (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken)):
            in_lists.append(isinstance(token, yaml.FlowSequenceStartToken))
        elif isinstance(token, (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)):
            in_lists.pop()
        elif isinstance(token, yaml.ScalarToken) and token.plain:
            # `{name:x}` has the key `name:x`, without a value.
            lone_key = isinstance(before, (yaml.FlowMappingStartToken, yaml.FlowEntryToken)) and not in_lists[-1]
            if slip := _slip_in_scalar(token, lines, in_lists[-1], lone_key):
                return slip
        elif isinstance(token, yaml.ScalarToken) and token.style in "'\"" and not token.value:
            # `''###''` is an empty text and a comment.
            rest = lines[token.start_mark.line][token.start_mark.column :].rstrip()
            if token.start_mark.line == token.end_mark.line and (match := DOUBLED_QUOTES.fullmatch(rest)):
                return Slip(rest, f'"{match[2]}"', token.start_mark.line + 1)
        before = token
    return None


def _slip_in_scalar(token: yaml.ScalarToken, lines: list[str], in_list: bool, lone_key: bool) -> Slip | None:
    """The slip in a text without quotes, which may go over several lines. in_list: it is an item in brackets."""
    start, end = token.start_mark, token.end_mark
    for number in range(start.line, end.line + 1):
        begin = start.column if number == start.line else 0
        piece = lines[number][begin : end.column if number == end.line else None]
        typed, slip = plain(piece).strip(" "), slip_in_value(piece)
        if lone_key or not lines[number][:begin].strip():  # a key, or on a line of its own where a key belongs
            needed = re.sub(f"^{ITEM}", "- ", re.sub(f"^{KEY_AND_VALUE}", r"\1: ", typed))
            if needed != typed or (typed != piece.strip(" ") and re.fullmatch(r"[a-z_]\w*:?|- .*", typed)):
                slip = Slip(piece.strip(" "), needed)
        if in_list and typed != piece and "," in typed:
            slip = Slip(piece, typed)
        if slip:
            return Slip(slip.found, slip.needed, number + 1)
    return None


def slip_before(text: str, line: int) -> Slip | None:
    """The first slip in a file that is no YAML, up to the line (from 1) where YAML noticed."""
    lines = LINE_BREAK.split(text)
    for number, found in enumerate(lines[:line], start=1):
        if found.strip().startswith("```"):  # of Markdown
            return Slip(found.strip(), "", number)
        needed = _outside_quotes(lambda part: part.replace("\t", "  "), plain(found))
        needed = _outside_quotes(lambda part: re.sub(rf"(?<=[{{,])(\s*){KEY_AND_VALUE}", r"\1\2: ", part), needed)
        needed = re.sub(rf"^(\s*){ITEM}", r"\1- ", needed)
        needed = re.sub(rf"^(\s*(?:- )?){KEY_AND_VALUE}", r"\1\2: ", needed)
        if re.fullmatch(r" *[a-z_][a-z0-9_]*", needed) and number < len(lines):
            below = lines[number]
            needed += ":" * (len(below) - len(below.lstrip(" ")) > len(needed) - len(needed.lstrip(" ")))
        if needed.rstrip() != found.rstrip(" \r"):
            return Slip(found.strip(" \r"), needed.strip(), number)
    return None
