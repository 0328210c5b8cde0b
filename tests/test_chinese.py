"""The Chinese pages have the commands, figures and links of the English ones."""

import re
from collections import Counter

import pytest
from helpers import ROOT

# Chinese page -> English page. Of the first, every command, name, figure and link is in both; the others are shorter.
EQUAL = {f"docs/zh/{name}.md": f"docs/{name}.md" for name in ("tutorial", "faq", "from_the_first_release")}
SHORTER = {f"docs/zh/{name}.md": f"docs/{name}.md" for name in ("installation", "weights", "own_data")}
SHORTER["README.zh-CN.md"] = "README.md"
PAIRS = [*EQUAL.items(), *SHORTER.items()]


def contents(page: str) -> dict[str, Counter]:
    """Blocks of code, names in backticks, figures and links of a page, each with how often it stands there."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^ *```\w*\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^ *```\w*\n.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    names = re.findall(r"`([^`]+)`", text)
    text = re.sub(r"`[^`]+`", "", text)
    links = re.findall(r"\]\(([^)]+)\)", text)
    text = re.sub(r"\]\([^)]+\)", "", text)
    # Stages, months and small counts are words in Chinese.
    figures = re.findall(r"\d[\d.,]*\d|\d(?= ?(?:bit|[GMT]?B\b|%))", re.sub(r"^#+ .*", "", text, flags=re.M))
    return {"blocks": Counter(blocks), "names": Counter(names), "figures": Counter(figures), "links": Counter(links)}


def targets(page: str, links: Counter) -> set[str]:
    """The English pages, files and addresses that links of a page lead to."""
    found = set()
    for link in links:
        path = link.partition("#")[0]
        if "://" not in link:
            path = str(((ROOT / page).parent / path).resolve().relative_to(ROOT)).replace("docs/zh/", "docs/")
        found.add(path.replace("README.zh-CN.md", "README.md"))
    return found


@pytest.mark.parametrize(("chinese", "english"), EQUAL.items())
def test_equal_pages(chinese, english):
    ours, theirs = contents(chinese), contents(english)
    for kind in ("blocks", "names", "figures"):
        assert ours[kind] == theirs[kind], (kind, ours[kind] - theirs[kind], theirs[kind] - ours[kind])
    assert targets(chinese, ours["links"]) == targets(english, theirs["links"])
    assert sum(ours["links"].values()) == sum(theirs["links"].values())


@pytest.mark.parametrize(("chinese", "english"), SHORTER.items())
def test_shorter_pages(chinese, english):
    ours, theirs = contents(chinese), contents(english)
    for kind in ("blocks", "figures"):
        assert set(ours[kind]) <= set(theirs[kind]), (kind, set(ours[kind]) - set(theirs[kind]))
    known = (ROOT / english).read_text(encoding="utf-8")
    assert [name for name in ours["names"] if name not in known and "alignment_zh" not in name] == []


@pytest.mark.parametrize("page", [chinese for chinese, _ in PAIRS])
def test_the_text_is_chinese(page):
    """Full-width punctuation between Chinese characters, no half-width one; no mangled characters."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(re.findall(r"[\u4e00-\u9fff]", text)) > 200
    assert re.findall(r"[\u4e00-\u9fff][,;:!?][\u4e00-\u9fff]", text) == [] and "\ufffd" not in text


def test_the_first_lines_of_the_readmes_link_each_other():
    for page, other in (("README.md", "README.zh-CN.md"), ("README.zh-CN.md", "README.md")):
        assert f"({other})" in "\n".join((ROOT / page).read_text(encoding="utf-8").splitlines()[:4])


def test_chinese_prompts_are_as_many_as_the_english_ones():
    from minigpt4.models.template import read_prompts

    english, chinese = (read_prompts(str(ROOT / f"prompts/alignment{end}.txt"), "{}") for end in ("", "_zh"))
    assert len(chinese) == len(english) and all(re.search(r"[\u4e00-\u9fff]", text) for text in chinese)
