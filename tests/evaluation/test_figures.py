"""Figures, their intervals, and tables."""

import numpy as np
import pytest

from minigpt4.common.errors import ConfigError
from minigpt4.evaluation import Answer, Example, mean
from minigpt4.evaluation.figures import Figure, intervals
from minigpt4.evaluation.scores import measure, table


def test_the_interval_of_a_share_is_that_of_the_binomial():
    values = [1] * 300 + [0] * 100
    low, high = intervals({"share": mean(values)})["share"]
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert low == pytest.approx(0.75 - half, abs=0.006) and high == pytest.approx(0.75 + half, abs=0.006)


def test_intervals_do_not_depend_on_the_order():
    rng = np.random.default_rng(1)
    counts = rng.random((500, 2))
    figures, mixed = ({"a": Figure(c), "b": mean(c[:, 0])} for c in (counts, rng.permutation(counts)))
    assert intervals(figures) == intervals(mixed)
    assert [figure.value for figure in figures.values()] == [figure.value for figure in mixed.values()]


def test_a_ratio_of_nothing_is_0():
    figure = Figure(np.zeros((3, 2)))
    assert figure.value == 0 and intervals({"x": figure}) == {"x": (0, 0)}


def example(number: int, group: str = "", **others) -> Example:
    return Example(str(number), (("user", ("Is it?",)),), ("Yes",), group=group, **others)


def test_questions_without_an_answer_are_counted():
    scores, figures = measure("yes_no", [example(n) for n in range(3)], {"1": Answer("yes"), "2": Answer("No.")})
    assert (scores["n"], scores["unanswered"], figures["accuracy"].value) == (2, 1, 0.5)


def test_tables_have_a_line_for_each_group():
    examples = [example(n, group="ab"[n % 2]) for n in range(4)]
    scores, _ = measure("yes_no", examples, {str(n): Answer("Yes" if n % 2 else "no") for n in range(4)})
    markdown, latex = table(scores, "my_model 50%")
    lines = markdown.splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        ["| my_model 50%", "50.0 [0.0, 100.0]"],
        ["| my_model 50%, a", "0.0 [0.0, 0.0]"],
        ["| my_model 50%, b", "100.0 [100.0, 100.0]"],
    ]
    assert latex.splitlines()[1].startswith(r"my\_model 50\% & 50.0") and latex.count("\\\\\n") == 4
    markdown, latex = table(scores, "a|b\\\nc")
    assert markdown.splitlines()[2].startswith(r"| a\|b\ c | ") and latex.splitlines()[1].startswith(
        r"a|b\textbackslash{} c"
    )


@pytest.mark.parametrize(("task", "words"), [("yes_no", "yes or no"), ("choice", "choices")])
def test_a_task_needs_references_of_its_kind(task, words):
    with pytest.raises(ConfigError, match=f"{task} needs .*{words}.* question 1 "):
        measure(task, [Example("1", (("user", ("Which?",)),), ("red",))], {"1": Answer("red")})


CHOICES = {"choices": ("fire", "ice", "an apple")}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("B", 1), ("(B)", 1), ("B. ice", 1), ("The answer is B.", 1), ("ice", 1), ("It is ice, of course.", 1),
        ("A", 0), ("A red thing made of ice", 1), ("fire or ice", 0), ("I do not know", 0), ("D", 0), ("", 0),
        ("Answer: B", 1), ("b.", 1), ("Option A is hot.\nSo the answer\nis: (B)", 1), ("Answer: A", 0),
    ],
)  # fmt: skip
def test_choices(answer, right):
    question = Example("1", (("user", ("Which is cold?",)),), ("ice",), **CHOICES)
    assert measure("choice", [question], {"1": Answer(answer)})[1]["accuracy"].value == right


@pytest.mark.parametrize(
    ("answer", "exact", "mentioned"),
    [("Red Apple.", 1, 1), ("It is a red  apple, I think.", 0, 1), ("red apples", 0, 0), ("", 0, 0)],
)
def test_names(answer, exact, mentioned):
    question = Example("1", (("user", (None,)),), ("red apple",))
    figures = measure("match", [question], {"1": Answer(answer)})[1]
    assert (figures["exact"].value, figures["mentioned"].value) == (exact, mentioned)


@pytest.mark.parametrize(
    ("answer", "yes"),
    [("Yes.", 1), ("no", 0), ("There is not. Yes", 0), ("Yes. There is no cat.", 1), ("I know it", 1), ("No!", 0)],
)
def test_yes_and_no(answer, yes):
    assert measure("yes_no", [example(1)], {"1": Answer(answer)})[1]["yes rate"].value == yes
