"""`data show`: the contact sheet has the processed pictures, and colours what the model learns."""

import json
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
from faulty_data import photo
from helpers import ROOT
from PIL import Image, ImageColor

from minigpt4.cli.data import main
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.data_tools import sheet
from minigpt4.data_tools.lengths import lengths_of
from minigpt4.data_tools.opening import processor_of, sources_of_config

TALK = [("user", "Is <image> red?"), ("assistant", "It is not."), ("user", "And <image>?"), ("assistant", "因为 🙂 Ü")]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config with a conversation of two pictures and a caption that is too long; the sheets' folder."""
    monkeypatch.chdir(ROOT)
    Image.new("RGB", (300, 200), "red").save(tmp_path / "red.png")
    photo(0).save(tmp_path / "photo.jpg")
    records = [
        {"images": ["photo.jpg", "red.png"], "messages": [{"role": role, "content": text} for role, text in TALK]},
        {"image": "red.png", "caption": "word " * 100},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {{arch: mini_gpt4, model_type: tiny, max_txt_len: 90, template: vicuna_v1}}\n"
        f"datasets: {{mine: {{builder: conversation, build_info: {{storage: {tmp_path}/a.jsonl}}}}}}\n"
    )
    return path


def samples(path) -> list[sheet.Sample]:
    cfg = Config(SimpleNamespace(cfg_path=str(path), options=[]))
    (source,) = sources_of_config(cfg)
    return [*sheet.samples_of(source, lengths_of(cfg)[0], processor_of(cfg, source), 2, seed=0)]


def test_what_is_learnt_and_where_the_images_stand(config):
    talk, caption = samples(config)
    learnt = "".join(text for text, colour in talk.text if colour == sheet.LEARNT)
    assert learnt == "It is not.</s>因为 🙂 Ü</s>"
    assert [text for text, colour in talk.text if colour == sheet.IMAGE] == ["[image 1]", "[image 2]"]
    everything = "".join(text for text, _ in talk.text)
    assert "USER: Is <Img>[image 1]</Img> red? ASSISTANT:It is not.</s>" in everything
    assert caption.text[-1][1] == sheet.CUT and "a.jsonl line 2" in caption.title and "90 learnt" in caption.title


def test_pictures_are_processed(config):
    (_, red), _ = [sample.pictures for sample in samples(config)]
    assert red.size == (64, 64)
    assert np.abs(np.asarray(red, dtype=int) - (255, 0, 0)).max() <= 1


def test_the_sheet(config, capsys):
    out = config.with_name("sheet.png")
    assert main(["show", "--cfg-path", str(config), "--out", str(out)]) == 0
    pixels = {pixel for _, pixel in Image.open(out).convert("RGB").getcolors(1 << 24)}
    assert {ImageColor.getrgb(colour) for colour in (sheet.LEARNT, sheet.IMAGE, sheet.CUT)} <= pixels
    assert "no glyph" in capsys.readouterr().out  # no font of Pillow's has 🙂
    with pytest.raises(ConfigError, match="exists"):
        main(["show", "--cfg-path", str(config), "--out", str(out)])


def test_files_without_a_config(config, capsys):
    out = config.with_name("sheet.png")
    assert main(["show", f"{config.parent}/a.jsonl", "--out", str(out), "--samples", "1"]) == 0
    assert "1 sample" in capsys.readouterr().out and out.stat().st_size > 1000


def test_lines_are_within_the_width():
    fonts = sheet.Fonts(None)
    text = [("Some words that go over several lines. " * 5, None), ("字" * 100, sheet.LEARNT), ("a\nb", None)]
    lines = [*sheet.wrap(text, fonts, 300)]
    assert all(sum(fonts.width(piece) for piece, _ in line) <= 300 for line in lines)
    shown = "".join(piece for piece, _ in chain.from_iterable(lines))
    assert shown.replace(" ", "") == "".join(part for part, _ in text).replace(" ", "").replace("\n", "")
    assert lines[-1] == [("b", None)]


def test_a_file_that_is_no_font(tmp_path):
    (tmp_path / "font.ttf").write_text("none")
    with pytest.raises(ConfigError, match="--font"):
        sheet.Fonts(tmp_path / "font.ttf")


def test_thin_pictures_and_long_texts(tmp_path):
    Image.new("RGB", (5000, 1)).save(tmp_path / "a.png")
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png", "caption": "word " * 20_000}))
    assert main(["show", f"{tmp_path}/a.jsonl", "--out", f"{tmp_path}/sheet.png"]) == 0
    with Image.open(tmp_path / "sheet.png") as drawn:
        assert sheet.MAX_LINES * sheet.LINE < drawn.height < (sheet.MAX_LINES + 10) * sheet.LINE
