"""A page of answers, the worst first: pictures, questions, answers, references and scores. It needs no other file."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from minigpt4.common.html_page import SIDE, html_page, img, small_jpeg
from minigpt4.conversation.pictures import PictureError, open_picture
from minigpt4.datasets.splits import spread
from minigpt4.evaluation.example import Answer, Example
from minigpt4.evaluation.figures import LEVEL, Figure

WORST = 300  # answers that come first
IDS = 10  # of equal questions
SPREAD = 200  # further answers, evenly over the rest

FILTER = """<form onsubmit="return false">
  <input id="filter" type="search" aria-label="Filter" placeholder="Filter: words of a question, an answer, a mark …">
  <small id="count"></small>
</form>"""


def page(
    title: str,
    scores: Mapping[str, Any],
    figures: Mapping[str, Figure],
    examples: Sequence[Example],
    answers: Mapping[str, Answer],
) -> str:
    """The HTML of the page.

    scores, figures: as from `scores.measure`; examples: those with an answer, in the same order.
    """
    name, first = next(iter(figures.items()))
    marks = [(flag, figure.each) for flag, figure in figures.items() if figure.flag]
    marked = np.sum([each > 0 for _, each in marks], axis=0) if marks else np.zeros(len(examples))
    ties = [_goodness(figure) for figure in [*figures.values()][1:2]]  # the second figure decides last
    order = np.lexsort((*ties, -marked, _goodness(first)))
    rest = order[WORST:]
    shown = [*order[:WORST], *rest[list(spread(len(rest), SPREAD))]]
    rows = []
    for number in shown:
        example, flags = examples[number], [flag for flag, each in marks if each[number] > 0]
        score = first.each[number] * first.scale
        rows.append(_row(example, answers[example.id].text, f"{score:.1f}", flags))
    summary = f"{scores['task']}: {len(examples):,} answers, the worst first, by {name}. "
    summary += f"Beside each figure is its {100 * LEVEL:.0f} % interval (bootstrap)."
    if len(shown) < len(examples):
        summary += f" Shown are the {WORST} worst and {len(shown) - WORST} spread over the rest; answers.jsonl has all."
    style, script = (Path(__file__).with_suffix(end).read_text(encoding="utf-8") for end in (".css", ".js"))
    numbers = f'<div class="wide"><table>{_table(scores)}</table></div>'
    head = [f"<h1>{escape(title)}</h1>", f"<p>{summary}</p>", numbers, FILTER]
    return html_page(title, "\n".join([*head, *rows, f"<script>\n{script}</script>"]), style)


def _goodness(figure: Figure) -> np.ndarray:
    """[n]: the figure of each example, or what rises as it falls if lower is better."""
    return -figure.each if figure.better == "lower" else figure.each


def _table(scores: Mapping[str, Any]) -> str:
    columns = {"all": scores, **scores.get("groups", {})}
    lines = ["<tr><th></th>" + "".join(f"<th>{escape(title)}</th>" for title in columns) + "</tr>"]
    for name in scores["figures"]:
        cells = []
        for column in columns.values():
            figure = column["figures"][name]
            value, low, high = (figure[key] * figure["scale"] for key in ("value", "low", "high"))
            cells.append(f"<td>{value:.1f} <small>{low:.1f} to {high:.1f}</small></td>")
        lines.append(f"<tr><th>{escape(name)}</th>{''.join(cells)}</tr>")
    counts = "".join(f"<td>{column['n']:,}</td>" for column in columns.values())
    return "\n".join([*lines, f"<tr><th>n</th>{counts}</tr>"])


def _row(example: Example, answer: str, score: str, flags: Sequence[str]) -> str:
    thumbnails = filter(None, map(thumbnail, example.pictures))
    pictures = "".join(img(small_jpeg(image)) for image in thumbnails)
    question = "".join(f'<p class="soft">{escape(text)}</p>' for text in [*_earlier(example), example.question] if text)
    group = "" if example.id.startswith(example.group) else example.group
    label = escape(f"{group} {', '.join([example.id, *example.merged][:IDS])}".strip())
    references = escape("\n".join(dict.fromkeys(example.references)))
    marks = "".join(f'<span class="error">{escape(flag)}</span>' for flag in flags)
    return (
        f"<article><div>{pictures}</div>"
        f'<div>{question}<p>{escape(answer) or "(nothing)"}</p><p class="soft references">{references}</p>'
        f'<small>{label}</small></div><div class="score">{score}{marks}</div></article>'
    )


def _earlier(example: Example) -> list[str]:
    """The turns of a conversation before the question."""
    turns = [(role, " ".join(part for part in parts if part)) for role, parts in example.messages[:-1]]
    return [f"{role}: {text}" for role, text in turns]


def thumbnail(picture: Any) -> Image.Image | None:
    """A picture of an example, at most SIDE pixels a side; None for cached features, and if it cannot be read."""
    try:
        image = _from_tensor(picture()) if callable(picture) else open_picture(picture)
    except PictureError:
        return None
    if image:
        image.thumbnail((SIDE, SIDE))
    return image


def _from_tensor(pixels: Any) -> Image.Image | None:
    """A processed picture [3,H,W], from its lowest value, black, to its highest; None for features [Q,W]."""
    if pixels.ndim != 3:
        return None
    pixels = pixels - pixels.min()
    scaled = (pixels / pixels.max().clamp(min=1e-6) * 255).byte()
    return Image.fromarray(scaled.permute(1, 2, 0).cpu().numpy())
