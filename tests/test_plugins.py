"""The plug-ins of CONTRIBUTING.md, taken from that page and run by train.py."""

import csv
import json
import re
import sys

import pytest
import torch
import yaml
from dataset_files import picture_bytes
from helpers import QFORMER, ROOT, VIT
from omegaconf import OmegaConf

from minigpt4.common.config import ConfigError
from train import main

PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# `<!-- plug-in: my_dataset.py -->`, then the fenced block that is this file.
FILES = dict(re.findall(r"<!-- plug-in: (\S+) -->\n```\w+\n(.*?)```\n", PAGE, flags=re.DOTALL))
# The other YAML blocks are parts of a run's file.
BLOCKS = [yaml.safe_load(block) for block in re.findall(r"(?<!-->\n)```yaml\n(.*?)```\n", PAGE, flags=re.DOTALL)]
MODULES = sorted(name.removesuffix(".py") for name in FILES if name.endswith(".py"))


@pytest.fixture
def plugins(tmp_path, monkeypatch, open_registry):
    """A folder with the plug-ins' files on the import path."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_text(content, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    yield folder
    for module in MODULES:
        sys.modules.pop(module, None)


@pytest.fixture
def tables(tmp_path):
    """pairs.csv and held_out.csv, and the pictures that they name."""
    for table, rows in (("pairs", range(12)), ("held_out", range(12, 16))):
        with open(tmp_path / f"{table}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["file", "caption"])
            for i in rows:
                (tmp_path / f"{i}.png").write_bytes(picture_bytes(i))
                writer.writerow([tmp_path / f"{i}.png", f"picture number {i} of the small set"])
    return tmp_path


@pytest.fixture
def small(golden_llm_folder):
    """The sections of a run's file that ask for MiniGPT-4 at the size of the golden data, its vision side random."""
    model = {"image_size": 28, "vit_model": VIT, "vit_weights": None, "q_former_model": None, "qformer": QFORMER}
    model |= {"num_query_token": 8, "llama_model": str(golden_llm_folder)}
    processors = {s: {"name": f"blip2_image_{s}", "image_size": 28} for s in ("train", "eval")}
    return {"model": model, "preprocess": {"vis_processor": processors}}


@pytest.fixture
def run(plugins, tables, monkeypatch):
    """Train two epochs on the dataset plug-in. Takes the modules to import and parts of the run's file.

    Returns the run's checkpoint, with the epochs' lines of its log.txt as "log" and its folder as "folder".
    """
    monkeypatch.chdir(tables)  # the page's tables are relative paths
    settings = {"device": "cpu", "num_workers": 1, "batch_size_train": 4, "iters_per_epoch": 2, "max_epoch": 2}
    base = {"run": settings | {"output_dir": "output", "log_freq": 1}}

    def train(imports, *blocks):
        OmegaConf.save(OmegaConf.merge(base, part("datasets"), *blocks), "my_run.yaml")
        main(["--cfg-path", "my_run.yaml", *(["--import", *imports] if imports else [])])
        (folder,) = (tables / "output").iterdir()
        log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines() if line.startswith('{"')]
        return torch.load(folder / "checkpoint_1.pth", weights_only=True) | {"log": log, "folder": folder}

    return train


def part(section, key=""):
    """The page's YAML block that has this section, with this key in it."""
    (found,) = [block for block in BLOCKS if section in block and (not key or key in block[section])]
    return {section: found[section]}


@pytest.fixture
def texts(monkeypatch):
    """The texts that MiniGPT-4 sees, in training and in validation."""
    from minigpt4.models import MiniGPT4

    seen = {True: [], False: []}
    forward = MiniGPT4.forward

    def spy(self, samples):
        seen[self.training] += samples["text_input"]
        return forward(self, samples)

    monkeypatch.setattr(MiniGPT4, "forward", spy)
    return seen


def test_every_plugin_of_the_page_is_run_here():
    names = ["dataset", "eval_task", "model", "processor", "projector", "schedule", "small_model", "task"]
    assert MODULES == [f"my_{name}" for name in names]
    assert PAGE.count("```python") == len(MODULES)


def test_dataset(run, small):
    done = run(["my_dataset"], small, part("run", "valid_splits"))
    assert [set(line) for line in done["log"]] == [{"train_lr", "train_loss"}, {"val_loss"}] * 2
    assert (done["folder"] / "checkpoint_best.pth").exists()
    assert set(done["model"]) == {"llama_proj.weight", "llama_proj.bias"}


def test_texts_of_a_dataset_stay_as_they_are(run, small, texts, tables):
    """Case, punctuation and length, without a text processor in the file."""
    rows = [f"{tables}/{i}.png,LONG: {'Word ' * 60}({i})!" for i in range(12)]
    (tables / "pairs.csv").write_text("\n".join(["file,caption", *rows]))
    run(["my_dataset"], small)
    assert len(texts[True]) == 16 and all(re.fullmatch(r"LONG: (Word ){60}\(\d+\)!", text) for text in texts[True])


def test_import_by_the_file(run, small):
    assert part("run", "imports") == {"run": {"imports": ["my_dataset"]}}
    assert len(run([], small, part("run", "imports"))["log"]) == 2


def test_a_run_is_started_again_from_its_own_config(run, small, plugins):
    """With the plug-ins of `--import`, and the same result. Its folder tells what was on the screen."""
    first = run(["my_dataset"], small)
    assert "Averaged stats" in (first["folder"] / "console.log").read_text(encoding="utf-8")
    sys.modules.pop("my_dataset")
    main(["--cfg-path", str(first["folder"] / "config.yaml")])
    (again,) = {*first["folder"].parent.iterdir()} - {first["folder"]}
    second = torch.load(again / "checkpoint_1.pth", weights_only=True)
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name])


def test_processor(run, small, texts):
    run(["my_dataset", "my_processor"], small, part("preprocess", "text_processor"))
    assert len(texts[True]) == 16
    assert all(re.fullmatch(r"Picture number \d+ of the small set\.", text) for text in texts[True])


def test_model_that_changes_a_part(run, small):
    done = run(["my_dataset", "my_model"], small, part("model", "arch"))
    layers = {f"llama_proj.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    assert set(done["model"]) == layers
    assert done["config"]["model"]["arch"] == "mini_gpt4_mlp"


def test_projector(run, small):
    done = run(["my_dataset", "my_projector"], small, part("model", "projector"))
    assert {name.rpartition(".")[0] for name in done["model"]} == {"llama_proj.0", "llama_proj.1"}
    assert done["llm_fingerprint"]["projector"] == "normed"


def test_model_of_its_own(run):
    done = run(["my_dataset", "my_small_model"], {"model": {"arch": "caption_length", "model_type": "small"}})
    assert set(done["model"]) == {"conv.weight", "conv.bias", "head.weight", "head.bias"}
    assert done["config"]["model"]["width"] == 16
    wrong = {"model": {"arch": "caption_length", "model_type": "small", "widthh": 8}}
    with pytest.raises(ConfigError, match=r"Unknown key model\.widthh .*Did you mean 'width'\?"):
        run(["my_dataset", "my_small_model"], wrong)


def test_task(run, small, texts):
    done = run(["my_dataset", "my_task"], small, part("run", "task"), part("run", "valid_splits"))
    assert {len(text.split()) for text in texts[True]} == {3}
    assert {len(text.split()) for text in texts[False]} == {7}
    assert done["config"]["run"]["max_words"] == 3
    with pytest.raises(ConfigError, match=r"run\.max_words = 'few' .* is not of type int"):
        run(["my_dataset", "my_task"], small, part("run", "task"), {"run": {"max_words": "few"}})


def test_schedule(run, small):
    done = run(["my_dataset", "my_schedule"], small, part("run", "lr_sched"), {"run": {"init_lr": 0.4}})
    assert [line["train_lr"] for line in done["log"]] == ["0.350", "0.150"]
    assert done["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.1)


def test_evaluation_task(plugins, tmp_path):
    from minigpt4.__main__ import main as command

    lines = [{"id": n, "prompt": f"Why {n}?", "answer": text} for n, text in enumerate(["No.", "It is so."])]
    for name in ("references", "answers"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (line,) = [line for line in PAGE.splitlines() if line.startswith("python -m minigpt4 evaluate")]
    places = {f: str(tmp_path / f) for f in ("answers.jsonl", "references.jsonl", "results")}
    assert command([places.get(word, word) for word in line.split()[3:]]) == 0
    figures = json.loads((tmp_path / "results" / "scores.json").read_text())["figures"]
    assert figures["words"]["value"] == 2 and figures["one word"]["value"] == 0.5
