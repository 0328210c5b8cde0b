"""The folder that `data check --out` writes: report.json for programs, index.html for people."""

import json
from pathlib import Path

from minigpt4.common.errors import ConfigError
from minigpt4.common.output import own_folder, write_whole
from minigpt4.data_tools.check import DatasetReport
from minigpt4.data_tools.findings import ERROR, WARNING, Finding
from minigpt4.data_tools.page import page
from minigpt4.data_tools.summary import count, summary

REPORT, MADE_BY = "report.json", "minigpt4 data check"


def prepare(folder: Path) -> None:
    """Create the folder of a report, or take that of an earlier one. Raises ConfigError for any other folder."""
    own_folder(folder, REPORT)
    path = folder / REPORT
    if path.exists() and f'"made_by": "{MADE_BY}"' not in path.read_text(encoding="utf-8", errors="replace")[:200]:
        raise ConfigError(f"--out {folder}: its {REPORT} is not of {MADE_BY}. Nothing was changed. Name a new folder.")


def write(folder: Path, reports: list[DatasetReport], note: str) -> None:
    """Write report.json, with all findings, and index.html. note: how lengths were counted, or empty."""
    content = {
        "made_by": MADE_BY,
        "errors": count(reports, ERROR),
        "warnings": count(reports, WARNING),
        "note": note,
        "datasets": [summary(report) | {"findings": [*map(_as_dict, report.findings)]} for report in reports],
    }
    write_whole(folder / REPORT, json.dumps(content, indent=1, ensure_ascii=False))
    write_whole(folder / "index.html", page(reports, note))


def _as_dict(finding: Finding) -> dict[str, str]:
    return {"kind": finding.kind, "level": finding.level, "where": finding.where, "what": finding.what}
