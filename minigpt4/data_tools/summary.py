"""What was found in a dataset, as numbers and as lines of text."""

from collections.abc import Iterable
from itertools import groupby

import numpy as np

from minigpt4.common.text import pluralize
from minigpt4.data_tools.check import DatasetReport
from minigpt4.data_tools.findings import ERROR, KINDS, NOTE, WARNING, Finding

SHOWN = 5  # findings of a kind; report.json has all of them
BARS = 24  # of the histogram, at most
MARKS = {ERROR: "ERROR  ", WARNING: "WARNING", NOTE: "note   "}


def count(reports: Iterable[DatasetReport], level: str) -> int:
    return sum(finding.level == level for report in reports for finding in report.findings)


def summary(report: DatasetReport) -> dict:
    """The numbers about a dataset, as in report.json."""
    lengths, pictures = report.rows["length"], report.pictures
    return {
        "name": report.source.name,
        "where": report.source.where,
        "records": report.num_records,
        "usable": len(report.rows),
        "pictures": len(pictures),
        "lengths": _lengths(report) if len(lengths) else None,
        "width": _range(pictures["width"]),
        "height": _range(pictures["height"]),
        "counts": {kind: len(found) for kind, found in by_kind(report).items()},
    }


def by_kind(report: DatasetReport) -> dict[str, list[Finding]]:
    return {kind: list(found) for kind, found in groupby(report.findings, key=lambda finding: finding.kind)}


def _lengths(report: DatasetReport) -> dict:
    lengths, lost = report.rows["length"], report.rows["lost"]
    counts, edges = np.histogram(lengths, bins=min(BARS, int(np.ptp(lengths)) + 1))
    found = {
        "unit": report.measure.unit,
        **_range(lengths),
        "mean": round(float(lengths.mean()), 1),
        "99 %": _covering(lengths, 0.99),
        "histogram": [[round(float(e), 1), int(n)] for e, n in zip(edges, counts, strict=False)],
    }
    if limit := report.measure.max_txt_len:
        found |= {
            "max_txt_len": limit,
            "cut": int((lost > 0).sum()),
            "lost": int(lost.sum()),
            "lost_share": float(lost.sum() / max(1, lengths.sum())),
            "max_txt_len that cuts none": int(lengths.max()),
            "max_txt_len that cuts 1 %": _covering(lengths, 0.99),
        }
    return found


def _range(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {}
    return {"least": int(values.min()), "median": int(np.median(values)), "most": int(values.max())}


def _covering(values: np.ndarray, share: float) -> int:
    """The least value that this share of the values does not exceed."""
    return int(np.quantile(values, share, method="higher"))


def as_text(report: DatasetReport) -> str:
    """A dataset's numbers and the first findings of each kind."""
    numbers = summary(report)
    lines = [f"{numbers['name']}: {numbers['where']}"]
    lines += [f"  {line}" for line in facts(numbers)]
    for kind, found in by_kind(report).items():
        level, one, several = KINDS[kind]
        lines.append(f"{MARKS[level]} {pluralize(len(found), one, several)}")
        lines += [f"        {each.where}{': ' if each.what else ''}{each.what}" for each in found[:SHOWN]]
        if len(found) > SHOWN:
            lines.append(f"        … and {len(found) - SHOWN:,} more")
    return "\n".join(lines)


def facts(numbers: dict) -> list[str]:
    """Sentences about the numbers of a `summary`."""
    lines = [
        f"{pluralize(numbers['records'], 'record')}, {numbers['usable']:,} usable; "
        f"{pluralize(numbers['pictures'], 'picture')}"
    ]
    if numbers["pictures"]:
        width, height = numbers["width"], numbers["height"]
        lines.append(
            f"pictures: {width['least']:,} to {width['most']:,} wide (median {width['median']:,}), "
            f"{height['least']:,} to {height['most']:,} high (median {height['median']:,})"
        )
    if lengths := numbers["lengths"]:
        after = " after the first question" if "cut" in lengths else ""
        lines.append(
            f"lengths{after}: {lengths['least']:,} to {lengths['most']:,} {lengths['unit']}s, median "
            f"{lengths['median']:,}; 99 % of the records have at most {lengths['99 %']:,}"
        )
        if lengths.get("cut") == 0:
            lines.append(f"max_txt_len={lengths['max_txt_len']} cuts no sample")
        elif "cut" in lengths:
            lines.append(
                f"max_txt_len={lengths['max_txt_len']} cuts {100 * lengths['cut'] / numbers['usable']:.1f} % of the "
                f"samples and {100 * lengths['lost_share']:.1f} % of the tokens; {lengths['most']:,} would cut none, "
                f"{lengths['99 %']:,} at most 1 % of the samples"
            )
    return lines
