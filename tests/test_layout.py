"""Rules about the code as a whole: imports point down, files that people rely on are there."""

import ast
import re

import pytest
from helpers import ROOT

# A package may import those of the ranks below its own, and its neighbours.
RANKS = {
    "common": 0,
    "models": 1,
    "datasets": 1,
    "processors": 1,
    "runners": 2,
    "tasks": 2,
    "conversation": 2,
    "doctor": 2,
    "serving": 3,
    "cli": 4,
    "__main__": 4,
}
MODULES = sorted(ROOT.glob("minigpt4/*/**/*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_point_down(path):
    own = path.relative_to(ROOT / "minigpt4").parts[0]
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "minigpt4" and len(parts) > 1 and parts[1] in RANKS:
            assert RANKS[parts[1]] <= RANKS[own], f"{path} imports {name}"


def test_every_package_has_a_rank():
    assert {path.relative_to(ROOT / "minigpt4").parts[0] for path in MODULES} <= set(RANKS)


def test_paths_named_in_the_docs_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/*.md"))]
    place = re.compile(r"`((?:minigpt4|train_configs|eval_configs|dataset|prompts|tests|docs)/[\w./-]*)")
    named = [(page.name, path) for page in pages for path in place.findall(page.read_text(encoding="utf-8"))]
    assert len(named) > 100
    assert not [(page, path) for page, path in named if not (ROOT / path).exists()]
