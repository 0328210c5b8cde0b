"""The page of answers in headless Chromium."""

import shutil

import pytest
import torch
from dataset_files import picture_bytes

from minigpt4.evaluation import Answer, Example
from minigpt4.evaluation.page import SPREAD, WORST, page
from minigpt4.evaluation.scores import measure

CHROMIUM = shutil.which("chromium")


def make_page(count: int) -> str:
    """Every third answer is right. Pictures are bytes, tensors, and files that are gone."""
    pictures = [picture_bytes(0), lambda: torch.linspace(-2, 2, 48).reshape(3, 4, 4), "/gone.jpg"]
    questions = [(("user", (None, f"Is there a <b>{number}</b>?")),) for number in range(count)]
    examples = [Example(str(n), questions[n], ("yes",), (pictures[n % 3],), group="ab"[n % 2]) for n in range(count)]
    answers = {str(n): Answer("No." if n % 3 else "Yes & so on", ended=n != 4) for n in range(count)}
    scores, figures = measure("yes_no", examples, answers)
    return page("A & B", scores, figures, examples, answers)


def test_a_page_of_many_has_the_worst_and_some_of_the_rest():
    text = make_page(1200)
    assert text.count("<article>") == WORST + SPREAD
    assert 0 < text.count("Yes &amp; so on") < SPREAD  # 800 answers are wrong


def test_earlier_turns_are_shown():
    messages = (("user", (None, "What <is> it?")), ("assistant", ("A cat.",)), ("user", ("Is it black?",)))
    examples, answers = [Example("1", messages, ("yes",))], {"1": Answer("No.", True)}
    scores, figures = measure("yes_no", examples, answers)
    text = page("A", scores, figures, examples, answers)
    assert text.index("user: What &lt;is&gt; it?") < text.index("assistant: A cat.") < text.index("Is it black?")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium (apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(width, tmp_path):
    from playwright.sync_api import sync_playwright

    (tmp_path / "answers.html").write_text(make_page(9), encoding="utf-8")
    asked, said = [], []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 800})
        tab.on("request", lambda request: asked.append(request.url.partition(":")[0]))
        tab.on("console", lambda message: said.append(message.text))
        tab.goto(f"file://{tmp_path}/answers.html")
        assert tab.title() == "A & B"
        assert tab.inner_text("article >> nth=0 >> .error") == "no end sign"  # wrong, and marked
        assert "Is there a <b>4</b>?" in tab.inner_text("article >> nth=0")
        assert tab.locator("img").count() == 6
        assert all(tab.eval_on_selector_all("img", "all => all.map(one => one.naturalWidth > 0)"))
        tab.fill("#filter", "yes so")
        assert tab.inner_text("#count") == "3 of 9"
        assert tab.locator("article:visible").count() == 3
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        browser.close()
    assert set(asked) <= {"file", "data"} and asked.count("file") == 1 and not said
