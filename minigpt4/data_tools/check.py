"""Checks of a whole dataset: reads every record and picture, in several processes, and compares them."""

import os
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from tqdm import tqdm

from minigpt4.data_tools.examine import LOOK, PICTURE, ROW, PartReport, examine_part, look_or_reason
from minigpt4.data_tools.findings import KINDS, Finding, Place
from minigpt4.data_tools.lengths import Characters, ModelTokens
from minigpt4.data_tools.pictures import BLURRED, FLAT, SIGNATURE, Look, find_copies
from minigpt4.data_tools.processes import in_processes
from minigpt4.data_tools.sources import Source
from minigpt4.datasets.datasets.packed_strings import PackedStrings

# Pictures that a worker looks at before it reports.
CHUNK = 64


@dataclass
class DatasetReport:
    """All that was seen in a dataset."""

    source: Source
    measure: Characters | ModelTokens
    rows: np.ndarray
    """The usable records, as `examine.ROW`."""
    pictures: np.ndarray
    """Their pictures, as `examine.PICTURE`, each file once."""
    findings: list[Finding]
    """By kind, in the order of KINDS, and the worst first."""
    num_records: int
    """Records, with those that cannot be used."""


@dataclass
class Collected:
    """What the workers have reported so far. Rows, pictures and paths are numbered through all parts."""

    findings: list[Finding] = field(default_factory=list)
    wheres: list[PackedStrings] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=lambda: [np.empty(0, ROW)])
    pictures: list[np.ndarray] = field(default_factory=lambda: [np.empty(0, PICTURE)])
    paths: dict[str, int] = field(default_factory=dict)
    """{path: number}."""
    num_rows: int = 0
    num_records: int = 0

    def add(self, report: PartReport) -> None:
        numbers = np.array([self.paths.setdefault(path, len(self.paths)) for path in report.paths], dtype=np.int64)
        pictures = report.pictures
        in_files = pictures["path"] >= 0
        pictures["path"][in_files] = numbers[pictures["path"][in_files]]
        pictures["row"] += self.num_rows
        self.num_rows += len(report.rows)
        self.num_records += report.num_records
        self.findings += report.findings
        self.wheres.append(PackedStrings(report.wheres))
        self.rows.append(report.rows)
        self.pictures.append(pictures)


def check(source: Source, measure: Characters | ModelTokens, workers: int) -> DatasetReport:
    """Read a dataset and compare its records and pictures with each other."""
    found = Collected()
    reports = in_processes(partial(examine_part, source, measure.measure), range(source.num_parts), workers)
    for report in tqdm(reports, total=source.num_parts, desc=f"{source.name}: reading", unit="part"):
        found.add(report)
    data = Comparison(found)
    data.look_at_files(f"{source.name}: pictures", workers)
    data.find_doubled()
    data.find_alike()
    rows = data.rows[data.usable]
    if not len(rows):
        data.findings.append(Finding("nothing", source.where))
    order = list(KINDS)
    findings = sorted(data.findings, key=lambda each: (order.index(each.kind), -each.badness))
    return DatasetReport(source, measure, rows, data.pictures, findings, found.num_records)


class Comparison:
    """The records and pictures of a dataset beside each other."""

    def __init__(self, found: Collected) -> None:
        self.rows, self.pictures = np.concatenate(found.rows), np.concatenate(found.pictures)
        self.findings, self.paths, self.wheres = found.findings, list(found.paths), found.wheres
        self.usable = self.rows["usable"].copy()
        self.ends = np.cumsum([len(wheres) for wheres in found.wheres])

    def where(self, row: int) -> str:
        """The place of a row, for messages."""
        part = int(np.searchsorted(self.ends, row, side="right"))
        return self.wheres[part][int(row - self.ends[part])]

    def look_at_files(self, title: str, workers: int) -> None:
        """Look at each picture file once. Records with one that cannot be read are no longer usable."""
        paths = self.pictures["path"]
        numbers, first, uses = np.unique(paths, return_index=True, return_counts=True)
        inside = np.flatnonzero(paths < 0)
        users = [pair for number, *pair in zip(numbers, first, uses, strict=True) if number >= 0]
        chunks = [self.paths[start : start + CHUNK] for start in range(0, len(self.paths), CHUNK)]
        looks = (look for chunk in in_processes(_look_at_all, chunks, workers) for look in chunk)
        bar = tqdm(zip(self.paths, users, looks, strict=True), title, len(users), unit="picture", disable=not users)
        read, unreadable = [], []
        for number, (path, (index, count), look) in enumerate(bar):
            if isinstance(look, str):
                more = f" ({count} records have it)" if count > 1 else ""
                where = self.where(self.pictures[index]["row"])
                self.findings.append(Finding("picture", where, f"{path}: {look}{more}"))
                unreadable.append(number)
                continue
            read.append(index)
            for (name, _), value in zip(LOOK, look, strict=True):
                self.pictures[name][index] = value
        self.usable[self.pictures["row"][np.isin(paths, unreadable)]] = False
        self.pictures = self.pictures[np.sort([*inside, *read]).astype(np.int64)]

    def find_doubled(self) -> None:
        """Records with the texts and pictures of another, and other records with its id."""
        content, ids = self.rows["content"], self.rows["id"]
        same_content, same_id = _first_like_it(content), _first_like_it(ids)
        for row in np.flatnonzero(same_content < np.arange(len(content))):
            self.findings.append(Finding("doubled", self.where(row), f"as {self._beside(same_content[row], row)}"))
        for row in np.flatnonzero((same_id < np.arange(len(ids))) & (content != content[same_id])):
            self.findings.append(Finding("doubled_id", self.where(row), f"as {self._beside(same_id[row], row)}"))

    def find_alike(self) -> None:
        """Pictures of one colour, blurred ones, and those that are nearly like another."""
        flat = self.pictures["contrast"] < FLAT
        for picture in self.pictures[flat]:
            self._add("flat", picture, f"{picture['width']} x {picture['height']}", 0.0)
        for picture in self.pictures[~flat & (self.pictures["sharpness"] < BLURRED)]:
            sharpness = float(picture["sharpness"])
            self._add("blurred", picture, f"sharpness {sharpness:.1f}, below {BLURRED:g}", -sharpness)
        rich = self.pictures[~flat]
        content = self.rows["content"][rich["row"]]
        for second, first, bits in find_copies(np.ascontiguousarray(rich["signature"]).view(SIGNATURE)):
            if content[first] != content[second]:  # of a doubled record
                name = self._name(rich[first], self._beside(rich[first]["row"], rich[second]["row"]))
                what = f"like {name} ({bits} of 64 bits differ)"
                self._add("copy", rich[second], what, -bits, rich[first])

    def _add(self, kind: str, picture: np.void, what: str, badness: float, like: np.void | None = None) -> None:
        like_place = None if like is None else self._place(like)
        where = self._name(picture, self.where(picture["row"]))
        self.findings.append(Finding(kind, where, what, badness, self._place(picture), like_place))

    def _beside(self, row: int, other: int) -> str:
        """The place of a row, without the folder that it has in common with another's."""
        return self.where(row).removeprefix(os.path.dirname(self.where(other)) + "/")

    def _name(self, picture: np.void, where: str) -> str:
        """The place of a picture in the record at `where`, for messages."""
        path = self.paths[picture["path"]] if picture["path"] >= 0 else ""
        if path:
            return where if path.endswith(where) else f"{where} {os.path.basename(path)}"
        return f"{where} picture {picture['number'] + 1}" if picture["number"] else where

    def _place(self, picture: np.void) -> Place:
        row = self.rows[picture["row"]]
        return Place(int(row["part"]), int(row["item"]), int(picture["number"]))


def _look_at_all(paths: list[str]) -> list[Look | str]:
    return [look_or_reason(path) for path in paths]


def _first_like_it(values: np.ndarray) -> np.ndarray:
    """For each value, the index of the first one that is equal."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return first[inverse]
