"""What a check says."""

from collections.abc import Iterable
from dataclasses import dataclass

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


def as_text(findings: Iterable[Diagnostic]) -> str:
    """Findings for people, a paragraph each."""
    marks = {OK: "ok     ", WARNING: "WARNING", ERROR: "ERROR  "}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.status]} {finding.check}: {finding.what}")
        if finding.fix:
            lines.append(f"        -> {finding.fix}")
    return "\n".join(lines)
