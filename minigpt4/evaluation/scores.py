"""Figures with intervals as a dict for JSON, and as lines of tables."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minigpt4.common.registry import registry
from minigpt4.evaluation.example import Answer, Example
from minigpt4.evaluation.figures import LEVEL, RESAMPLES, SEED, Figure, intervals

# What stands in LaTeX for signs that mean something else there.
LATEX = str.maketrans(
    {sign: f"\\{sign}" for sign in "&%$#_{}"} | {"\\": r"\textbackslash{}", "~": r"\~{}", "^": r"\^{}"}
)


def measure(task: str, examples: Sequence[Example], answers: Mapping[str, Answer]) -> tuple[dict, dict[str, Figure]]:
    """The scores of answers {id: answer} for JSON, and the figures over the examples that have an answer.

    Examples without an answer are counted and left out.
    """
    answered = [example for example in examples if example.id in answers]
    figures = registry.get("eval_task", task)().measure(answered, [answers[each.id] for each in answered])
    scores = {
        "task": task,
        "n": len(answered),
        "unanswered": len(examples) - len(answered),
        "interval": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED},
        "figures": _described(figures),
    }
    groups = np.array([example.group for example in answered])
    if len(names := sorted({*groups.tolist()})) > 1:
        chosen = {name: groups == name for name in names}
        scores["groups"] = {
            name: {"n": int(rows.sum()), "figures": _described({k: f.select(rows) for k, f in figures.items()})}
            for name, rows in chosen.items()
        }
    return scores, figures


def _described(figures: Mapping[str, Figure]) -> dict[str, dict[str, float]]:
    ends = intervals(figures)
    return {
        name: {"value": figure.value, "low": ends[name][0], "high": ends[name][1], "scale": figure.scale}
        for name, figure in figures.items()
    }


def table(scores: Mapping[str, Any], name: str) -> tuple[str, str]:
    """A table of the figures in Markdown, and one in LaTeX: a line for all examples, and one for each group.

    name: the model's name in the first column. Values are times their `scale`, with intervals.
    """
    lines = [(name, scores)] + [(f"{name}, {group}", each) for group, each in scores.get("groups", {}).items()]
    lines = [(" ".join(title.split()), each) for title, each in lines]  # without line breaks
    titles = ["model", *scores["figures"], "n"]
    rows = [[title, *map(_shown, each["figures"].values()), str(each["n"])] for title, each in lines]
    markdown = [[cell.replace("|", r"\|") for cell in row] for row in (titles, ["---"] * len(titles), *rows)]
    latex = [[cell.translate(LATEX) for cell in row] for row in (titles, *rows)]
    return (
        "".join(f"| {' | '.join(row)} |\n" for row in markdown),
        "".join(f"{' & '.join(row)} \\\\\n" for row in latex),
    )


def _shown(figure: Mapping[str, float]) -> str:
    value, low, high = (figure[key] * figure["scale"] for key in ("value", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"
