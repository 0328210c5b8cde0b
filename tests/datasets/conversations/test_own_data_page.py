"""The examples of docs/own_data.md, read out of the page."""

import os
import re
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from helpers import PYTHONPATH, ROOT
from PIL import Image

from minigpt4.common.config import Config
from minigpt4.common.schema import MiniGPT4Config
from minigpt4.conversation.loading import load_chat
from minigpt4.datasets.conversations.formats import FORMS, read_records
from minigpt4.datasets.conversations.record import Picture
from minigpt4.models.template import TEMPLATES, Template, resolve

PAGE = (ROOT / "docs/own_data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"<!-- format: (\w+) (\S+) -->\n```\w*\n(.*?)```", PAGE, flags=re.DOTALL)


def test_each_text_format_has_an_example():
    assert {format for format, _, _ in EXAMPLES} == set(FORMS) - {"folder", "parquet", "shards"}


@pytest.mark.parametrize(("format", "name", "text"), EXAMPLES, ids=[format for format, _, _ in EXAMPLES])
def test_example(tmp_path, format, name, text):
    if format == "coco":
        pytest.importorskip("pycocotools")
    (tmp_path / name).write_text(text, encoding="utf-8")
    for picture in ("cat.jpg", "dog.jpg"):
        (tmp_path / picture).touch()
    found, records = read_records(str(tmp_path / name))
    assert found == format and len(records) >= 2
    parts = [part for record in records for message in record.messages for part in message.parts]
    assert {part for part in parts if isinstance(part, Picture)} == {
        Picture(f"{tmp_path}/cat.jpg"),
        Picture(f"{tmp_path}/dog.jpg"),
    }
    assert not any("<image>" in part for part in parts if isinstance(part, str))
    words = {record.messages[-1].parts[0] for record in records}
    assert words & {"A cat.", "A cat on a red sofa.", "A cat on a red sofa ."}


def test_the_page_names_every_column_and_suffix():
    from minigpt4.datasets.conversations.formats import COLUMNS
    from minigpt4.datasets.conversations.pictures import SUFFIXES

    for names in COLUMNS.values():
        assert all(f"`{name}`" in PAGE for name in names)
    assert all(f"`{suffix}`" in PAGE or f"name{suffix}" in PAGE for suffix in SUFFIXES if suffix != ".tiff")


WALK = re.search(r"## Ten minutes.*?(?=\n## )", PAGE, flags=re.DOTALL)[0]
SETTINGS = re.findall(r"```yaml\n(.*?)```", WALK, flags=re.DOTALL)
STAGE3 = ROOT / "train_configs/minigpt4_tiny_stage3_conversations.yaml"


@pytest.mark.parametrize("number", [0, 1])
def test_settings_of_the_walk_through_load(tmp_path, number):
    (tmp_path / "my_run.yaml").write_text(SETTINGS[number], encoding="utf-8")
    Config(SimpleNamespace(cfg_path=tmp_path / "my_run.yaml", options=[]))


def test_the_walk_through_goes_on_from_stage_2_in_its_template_and_chats_in_it(tmp_path):
    """The same texts as `vicuna_v0`, but not of that name: chat then writes them, too."""
    (tmp_path / "my_run.yaml").write_text(SETTINGS[0], encoding="utf-8")
    for path in (tmp_path / "my_run.yaml", STAGE3):
        cfg = Config(SimpleNamespace(cfg_path=path, options=[])).model_cfg
        template = resolve(MiniGPT4Config.from_section(cfg))
        assert type(template) is Template and asdict(template) == asdict(TEMPLATES["vicuna_v0"])


@pytest.mark.slow
def test_a_folder_of_ones_own_takes_the_walk(tmp_path, monkeypatch):
    """The settings, with two steps, and an answer of the trained layer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(12):
        Image.new("RGB", (90, 60), (20 * number, 0, 99)).save(tmp_path / "photos" / f"{number}.png")
        (tmp_path / "photos" / f"{number}.txt").write_text(f"A plain colour, number {number}.", encoding="utf-8")
    text = SETTINGS[0].replace("/data/photos", str(tmp_path / "photos")).replace("prompts/", f"{ROOT}/prompts/")
    (tmp_path / "my_run.yaml").write_text(text, encoding="utf-8")
    val = "datasets.my_photos.build_info.val=0.3"
    options = ["run.num_workers=0", "run.max_epoch=1", "run.batch_size_train=4", val]
    command = [sys.executable, ROOT / "train.py", "--cfg-path", "my_run.yaml", "--options", *options]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": PYTHONPATH}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "output").iterdir()
    assert (run / "checkpoint_best.pth").is_file()
    cfg = Config(SimpleNamespace(cfg_path="my_run.yaml", options=[f"model.ckpt={run}"]))
    chat = load_chat(cfg, torch.device("cpu"))
    conv, img_list = chat.new_conversation(), []
    chat.upload_img(tmp_path / "photos" / "0.png", conv, img_list)
    chat.ask("What is it?", conv)
    assert conv.get_prompt() == "###Human: <Img><ImageHere></Img> What is it? ###Assistant: "
    assert chat.answer(conv, img_list, do_sample=False, max_new_tokens=9)[0]
