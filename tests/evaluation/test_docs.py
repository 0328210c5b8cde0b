"""docs/evaluation.md: its example runs, and it names what there is."""

import re

from helpers import ROOT

from minigpt4.common.registry import registry
from minigpt4.evaluation.failures import KINDS

PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def test_the_python_example_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.strip() == re.search(r"print\(.*# (.*)", code)[1]


def test_the_page_names_the_tasks_and_failures():
    rows = set(re.findall(r"^\| `([\w ]+)` \|", PAGE, flags=re.MULTILINE))
    own = [
        name
        for name in registry.names("eval_task")
        if registry.get("eval_task", name).__module__.startswith("minigpt4.")
    ]
    assert len(own) >= 5 and rows >= {*own, *KINDS}
