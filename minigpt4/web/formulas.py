"""TeX formulas as MathML, which browsers show without fonts or scripts of others."""

import importlib.util
import re
from itertools import accumulate

MAX_CHARACTERS = 1000  # of a formula; reading one takes up to 0.2 s
MAX_ALL = 10_000  # characters of all formulas of a request,
LEAST = 10  # each of which counts as this many at least
# A short definition can stand for gigabytes.
_DEFINITION = re.compile(r"\\(\w*def|\w*command|let|DeclareMathOperator)(?![a-zA-Z])")


def read_formulas(formulas: list[str]) -> list[str | None]:
    """The MathML of the formulas up to MAX_ALL; None: one is shown as it was written.

    None is for texts that are no formulas, for commands that are not known, and without the library latex2mathml.
    """
    ends = accumulate(max(len(formula), LEAST) for formula in formulas)
    count = max(1, sum(end <= MAX_ALL for end in ends))
    return [_mathml(formula) for formula in formulas[:count]]


def _mathml(formula: str) -> str | None:
    if len(formula) > MAX_CHARACTERS or _DEFINITION.search(formula) or not importlib.util.find_spec("latex2mathml"):
        return None
    from latex2mathml.converter import convert

    try:
        mathml = convert(formula, display="block")  # what limits look like in a line of text, the browser knows
    except Exception:  # of many kinds, RecursionError among them
        return None
    return None if "\\" in mathml or "&#x0005C;" in mathml else mathml  # an unknown command
