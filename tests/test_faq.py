"""docs/faq.md: the messages that it quotes are those of the code."""

import ast
import re

from helpers import ROOT

PAGES = [ROOT / "docs/faq.md", ROOT / "docs/zh/faq.md"]
# Messages of the first release and of other programs.
OF_OTHERS = {
    "No matching distribution found for torch",
    "ModuleNotFoundError: No module named 'omegaconf'",
    "Repo id must be in the form",
    "StopIteration",
    "CUDA out of memory",
    "ChildFailedError",
    "Bus error",
    "Could not create share link",
    "Loaded 0 records for train split",
    "nan",
}
# Symptoms that are no messages: names and characters.
NAMES = {"minigpt4.models.blip2", "wandb_log", "batch_size", "pretrain_vicuna0", "ckpt", "：", "“ ”"}
# Messages with a part that the code fills in, as the code has them.
FILLED = {
    "MiniGPT-4 needs Python 3.11 or newer": "MiniGPT-4 needs Python {}.{} or newer",
    "Unknown model 'minigpt4'": "Unknown {} {}.",
    "Unknown key": "Unknown key {}{}",
    "gives datasets.laion.build_info.storage more than once": "--options gives {} more than once: ",
    "was trained with a language model 5120": " was trained with a language model {}",
    "is a Git-LFS pointer": "it is a Git-LFS pointer",
    "bitsandbytes is not installed": "{} is not installed; ",
    "torchrun started 4 processes on this machine": "torchrun started {} processes on this machine",
}


def texts_of_the_code() -> str:
    """All texts of the package and its scripts, one a line; a `{}` stands for what is filled in."""
    texts = [path.read_text(encoding="utf-8") for path in ROOT.glob("dataset/*.sh")]
    for path in [*ROOT.glob("minigpt4/**/*.py"), ROOT / "train.py", ROOT / "demo.py"]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "{}" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def symptoms(text: str) -> set[str]:
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("|") and not line.startswith("| ---")]
    return {quoted for row in rows for quoted in re.findall(r"`([^`]+)`", row)}


def test_quoted_messages_are_those_of_the_code():
    code = texts_of_the_code()
    for page in PAGES:
        quoted = symptoms(page.read_text(encoding="utf-8")) - OF_OTHERS - NAMES
        assert len(quoted) > 15
        for message in quoted:
            assert FILLED.get(message, message) in code, message
