"""What the documents say about the code, held against the code."""

import ast
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest
from dataset_files import picture_bytes
from helpers import ROOT

from minigpt4.common import model_schema, schema
from minigpt4.common.config import parse_options

PAGES = [*ROOT.glob("*.md"), ROOT / "docker/README.md", *sorted(ROOT.glob("docs/**/*.md"))]
README, FIDELITY = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/fidelity.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        assert (page.parent / path).exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (page.parent / path).read_text(encoding="utf-8"), flags=re.MULTILINE)
            # as GitHub makes them: without punctuation
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_name_files_and_keys_that_exist(page):
    text = page.read_text(encoding="utf-8")
    for path in re.findall(r"--cfg-path (\S+\.yaml)", text):
        assert path == "my_run.yaml" or (ROOT / path).exists(), path
    for section, name in re.findall(r"(?<![\w./])(model|run)\.([a-z_0-9]+)", text):
        sections = {"run": schema.RunConfig, "model": schema.MiniGPT4Config}
        assert name in {field.name for field in fields(sections[section])}, f"{section}.{name}"


def test_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 120
    assert max(map(len, lines)) <= 120


def test_readme_names_the_places():
    for path, names in {
        "minigpt4/models/mini_gpt4.py": ["forward", "encode_img", "loss"],
        "minigpt4/runners/runner_base.py": ["train", "train_epoch", "train_step", "optimizer_step", "save_checkpoint"],
        "minigpt4/conversation/conversation.py": ["Conversation", "Chat", "get_prompt"],
    }.items():
        assert path in README
        assert set(names) <= defined(ROOT / path)
        assert all(f"{name}`" in README for name in names)


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    picture = tmp_path / "picture.png"
    picture.write_bytes(picture_bytes(0))
    monkeypatch.chdir(ROOT)
    made_by_quickstart = "data/tiny/heldout/image/0.jpg"
    assert made_by_quickstart in code
    exec(code.replace(made_by_quickstart, str(picture)), {})
    assert capsys.readouterr().out.strip()


def test_options_of_the_readme_parse():
    options = re.findall(r"--options ((?:'[^']*'|[\w.]+=\S+)(?: (?:'[^']*'|[\w.]+=\S+))*)", README)
    assert options
    for group in options:
        parse_options([option.strip("'`") for option in re.findall(r"'[^']*'|\S+", group)])


def test_installation_lists_all_extras():
    table = (ROOT / "docs/installation.md").read_text(encoding="utf-8").split("| extra |")[1].split("\n\n")[0]
    named = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert sorted(named) == sorted(extras)


def test_fidelity_names_tests_that_exist():
    # `::name` is in the file that was named last
    references = re.findall(r"`([\w/.]*)::(\w+)`", FIDELITY)
    assert len(references) > 20
    path = ""
    for named, name in references:
        path = named or path
        assert name in defined(ROOT / path), f"{path}::{name}"


def test_fidelity_lists_the_inert_keys():
    sections = {schema.RunConfig: "run", schema.MiniGPT4Config: "model", schema.EnvConfig: "env"}
    sections[schema.DatasetConfig] = "datasets.<name>"
    files = [Path(module.__file__) for module in (schema, model_schema)]
    inert = set()
    for node in [node for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body]:
        if isinstance(node, ast.ClassDef):
            section = {cls.__name__: name for cls, name in sections.items()}.get(node.name, node.name)
            for key, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(key, ast.AnnAssign) and "*Inert*" in ast.unparse(text):
                    inert.add(f"{section}.{key.target.id}")
    assert inert
    table = FIDELITY.split("## Inert keys")[1]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`([\w.<>]+)`", " ".join(rows))) == inert


def defined(path: Path) -> set[str]:
    """Names of the functions and classes in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
