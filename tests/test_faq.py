"""docs/faq.md: the messages that it quotes are those of the code."""

import ast
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers import ROOT

from minigpt4.common.config import Config
from minigpt4.common.registry import registry

PAGES = [ROOT / "docs/faq.md", ROOT / "docs/zh/faq.md"]
# Messages of the first release and of other programs.
OF_OTHERS = {
    "No matching distribution found for torch",
    "ModuleNotFoundError: No module named 'PIL'",
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
NAMES = {"minigpt4.models.blip2", "wandb_log", "batch_size", "ckpt", "：", "“ ”"}
# Messages with a part that the code fills in, as the code has them.
FILLED = {
    "MiniGPT-4 needs Python 3.11 or newer": "MiniGPT-4 needs Python {}.{} or newer",
    "Unknown model 'minigpt_v2'": "Unknown {} {}.",
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


STAGES = [ROOT / f"train_configs/minigpt4_{name}.yaml" for name in ("stage1_pretrain", "stage2_finetune")]


@pytest.mark.parametrize("stage", STAGES)
def test_options_of_the_remedies_fit_both_stages(stage):
    """As run.init_lr did not, below the files' run.min_lr."""
    remedies = re.findall(r"`--options (run\.[^`<]+)`", PAGES[0].read_text(encoding="utf-8"))
    assert len(remedies) > 4
    for remedy in remedies:
        Config(SimpleNamespace(cfg_path=str(stage), options=remedy.split()))


@pytest.mark.parametrize(
    ("line", "mistake", "symptom"),
    [
        ("arch: mini_gpt4", "arch: minigpt_v2", "Unknown model 'minigpt_v2'"),
        ("run:\n", "run:\n  wandb_log: False\n", "is a key of upstream's later code"),
        ("  cc_sbu_align:\n", "  cc_sbu_align:\n    batch_size: 12\n", "is a key of upstream's later code"),
        ("run:\n", "run:\n  max_epochs: 1\n", "Unknown key"),
    ],
)
def test_mistakes_in_yaml_files_show_their_symptom(tmp_path, line, mistake, symptom):
    assert symptom in symptoms(PAGES[0].read_text(encoding="utf-8"))
    text = STAGES[1].read_text(encoding="utf-8")
    assert line in text
    file = tmp_path / "run.yaml"
    file.write_text(text.replace(line, mistake, 1), encoding="utf-8")
    with pytest.raises(Exception, match=symptom):
        registry.get_model_class(Config(SimpleNamespace(cfg_path=str(file), options=[])).model_cfg.arch)


@pytest.mark.parametrize("command", [["train.py"], ["demo.py"], ["-m", "minigpt4", "doctor"]])
def test_without_the_libraries_the_first_that_is_missing_is_the_one_of_the_page(command):
    done = subprocess.run([sys.executable, "-S", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] in symptoms(PAGES[0].read_text(encoding="utf-8"))
