"""The page of `data check`: one file, with its pictures in it."""

import html
import io
from collections.abc import Iterable

from minigpt4.common.files import read_regular
from minigpt4.common.html_page import html_page, img, small_jpeg
from minigpt4.common.rgb import open_image
from minigpt4.data_tools.check import DatasetReport
from minigpt4.data_tools.findings import ERROR, KINDS, WARNING, Finding, Place
from minigpt4.data_tools.sources import Fault, Source
from minigpt4.data_tools.summary import by_kind, count, facts, pluralize, summary

SHOWN = 60  # findings of a kind
STYLE = """
summary { font-weight: 600; padding: .5rem 0; }
details { border-top: 1px solid var(--line); } details[open] { padding-bottom: .75rem; }
.note { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: .75rem; }
.card { border: 1px solid var(--line); border-radius: .4rem; padding: .5rem; font-size: .85rem; }
.card { overflow-wrap: anywhere; }
.card img { height: 7rem; max-width: 49%; object-fit: contain; margin-right: .3rem; background: var(--back); }
.where { display: block; font-family: ui-monospace, monospace; }
svg { width: 100%; max-width: 40rem; height: auto; display: block; } svg rect { fill: #3b82c4; }
svg text { font-size: 11px; fill: currentColor; } .limit { stroke: var(--error); stroke-dasharray: 4 3; }
"""


def page(reports: list[DatasetReport], note: str) -> str:
    """The whole page as HTML. note: how lengths were counted, or empty."""
    totals = f"{pluralize(count(reports, ERROR), 'error')}, {pluralize(count(reports, WARNING), 'warning')}"
    start = [f"<h1>Data check: {totals}</h1>", f"<p>{html.escape(note)}</p>" if note else ""]
    return html_page("Data check", "".join([*start, *map(_dataset, reports)]), STYLE)


def _dataset(report: DatasetReport) -> str:
    numbers = summary(report)
    listed = "".join(f"<li>{html.escape(line)}</li>" for line in facts(numbers))
    kinds = by_kind(report)
    shown = [finding for found in kinds.values() for finding in found[:SHOWN]]
    places = {place for finding in shown for place in (finding.picture, finding.like) if place}
    thumbnails = read_thumbnails(report.source, places)
    sections = [_section(kind, found, thumbnails) for kind, found in kinds.items()]
    histogram = _histogram(numbers["lengths"]) if numbers["lengths"] else ""
    title = f"{html.escape(numbers['name'])}: {html.escape(numbers['where'])}"
    return f"<h2>{title}</h2><ul>{listed}</ul>{histogram}{''.join(sections)}"


def _section(kind: str, found: list[Finding], thumbnails: dict[Place, bytes]) -> str:
    level, one, several = KINDS[kind]
    more = f"<p>… and {len(found) - SHOWN:,} more, in report.json</p>" if len(found) > SHOWN else ""
    cards = "".join(_card(finding, thumbnails) for finding in found[:SHOWN])
    opened = " open" if level == ERROR or any(finding.picture for finding in found) else ""
    title = f'<span class="{level}">{level}</span> {pluralize(len(found), one, several)}'
    return f'<details{opened}><summary>{title}</summary><div class="cards">{cards}</div>{more}</details>'


def _card(finding: Finding, thumbnails: dict[Place, bytes]) -> str:
    places = [place for place in (finding.picture, finding.like) if place in thumbnails]
    images = "".join(img(thumbnails[place]) for place in places)
    where, what = _escaped(finding.where), _escaped(finding.what)
    return f'<div class="card">{images}<span class="where">{where}</span>{what}</div>'


def _escaped(text: str) -> str:
    return html.escape("".join(char if char.isprintable() else repr(char)[1:-1] for char in text))


def _histogram(lengths: dict) -> str:
    """Bars of the number of samples by length, and a line at max_txt_len."""
    bars, width, height = lengths["histogram"], 600, 110
    tallest = max(number for _, number in bars)
    step = width / len(bars)
    least, most = lengths["least"], max(lengths["most"], lengths["least"] + 1)
    drawn = [
        f'<rect x="{place * step:.1f}" y="{height - number / tallest * height:.1f}" width="{step - 1:.1f}" '
        f'height="{number / tallest * height:.1f}"><title>from {start:g}: {number:,}</title></rect>'
        for place, (start, number) in enumerate(bars)
    ]
    drawn += [
        f'<text x="0" y="{height + 14}">{least:,}</text>',
        f'<text x="{width}" y="{height + 14}" text-anchor="end">{most:,} {lengths["unit"]}s</text>',
    ]
    limit = lengths.get("max_txt_len")
    if limit and least < limit < most:
        x = (limit - least) / (most - least) * width
        drawn.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}"/>')
        drawn.append(f'<text x="{x + 4:.1f}" y="12">max_txt_len {limit}</text>')
    label = "Samples by length"
    return f'<svg viewBox="0 0 {width} {height + 20}" role="img" aria-label="{label}">{"".join(drawn)}</svg>'


def read_thumbnails(source: Source, places: Iterable[Place]) -> dict[Place, bytes]:
    """Small pictures as JPEGs. Each part is read once more, up to the last of its places."""
    found: dict[Place, bytes] = {}
    waiting: dict[int, dict[int, list[Place]]] = {}
    for place in sorted(places):
        waiting.setdefault(place.part, {}).setdefault(place.item, []).append(place)
    for part, items in waiting.items():
        for number, item in enumerate(source.read(part)):
            if number > max(items):
                break
            record = item.record if isinstance(item, Fault) else item
            for place in items.get(number, ()):
                picture = record.pictures[place.number]
                content = read_regular(picture) if isinstance(picture, str) else picture
                found[place] = small_jpeg(open_image(io.BytesIO(content)))
    return found
