"""The result of a check."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

# The advice where a check itself failed, after which the run can be tried, but is not known to work.
NOT_MADE = "The run may fail likewise. If the message names no setting of yours, please report this as a bug of doctor."
OK, WARNING, ERROR = "ok", "warning", "error"


@dataclass(frozen=True)
class Diagnostic:
    """One thing that was looked at."""

    check: str
    """What was looked at: a key of the config, or a word such as "GPU"."""
    status: str
    """OK, WARNING (the run may go wrong) or ERROR (it will)."""
    what: str
    """What was found."""
    fix: str = ""
    """What to change."""


def ok(check: str, what: str) -> Diagnostic:
    return Diagnostic(check, OK, what)


def warning(check: str, what: str, fix: str = "") -> Diagnostic:
    return Diagnostic(check, WARNING, what, fix)


def error(check: str, what: str, fix: str = "") -> Diagnostic:
    return Diagnostic(check, ERROR, what, fix)


def verdict(problem: bool, check: str, what: str, fix: str, status: str = ERROR) -> Diagnostic:
    """A diagnostic of `status` with its fix if there is a problem, else OK with the same text."""
    return Diagnostic(check, status, what, fix) if problem else ok(check, what)


def as_json(diagnostic: Diagnostic) -> str:
    """A diagnostic as a JSON object on one line."""
    return json.dumps(asdict(diagnostic), ensure_ascii=False)


def as_text(diagnostics: Iterable[Diagnostic]) -> str:
    """Diagnostics for people, a paragraph each."""
    marks = {OK: "ok     ", WARNING: "WARNING", ERROR: "ERROR  "}
    lines = []
    for diagnostic in diagnostics:
        lines.append(f"{marks[diagnostic.status]} {diagnostic.check}: {diagnostic.what}")
        if diagnostic.fix:
            lines.append(f"        -> {diagnostic.fix}")
    return "\n".join(lines)
