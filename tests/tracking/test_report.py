"""report.html: everything on one page, and nothing of it from elsewhere."""

import base64
import io
import json
import re
from types import SimpleNamespace

import pytest
from PIL import Image

from minigpt4.__main__ import main
from minigpt4.common.config import Config
from minigpt4.tracking import metrics, report, run_files
from minigpt4.tracking.record import RunRecord
from minigpt4.tracking.trackers import RunInfo


@pytest.fixture
def folder(tmp_path, make_run):
    """A run with results, texts and marks that HTML would read."""
    folder = make_run(tmp_path / "run", CIDEr=0.25, **{"share/laion": 2 / 3, "share/cc_sbu": 1 / 3})
    path = tmp_path / "my_run.yaml"
    path.write_text("run: {init_lr: 3e-3, name: 'a <b> & c'}\ndatasets: {cc_sbu: {sample_ratio: 2}}\n")
    run_files.write_run_files(Config(SimpleNamespace(cfg_path=str(path), options=[])), folder, 1)
    file = metrics.MetricsFile(folder / metrics.NAME)
    file.write(100, {"test/val_loss": 0.125, "answers": "<script>a cat</script>"})
    for step, was in ((50, "70"), (90, "29.7")):
        file.write(step, {"warning/val_exact since start": f"val: exact is 7.1; before training it was {was}."})
    figure = {"value": 0.5551, "low": 0.53, "high": 0.58, "scale": 100}
    (folder / "heldout").mkdir()
    (folder / "heldout" / "scores.json").write_text(
        json.dumps({"task": "match", "n": 1594, "figures": {"exact <name>": figure}})
    )
    return folder


def test_the_page_holds_everything(folder):
    page = report.write_report(folder).read_text(encoding="utf-8")
    text = re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]+>", " ", page, flags=re.DOTALL)
    words_of_the_page = """a &lt;b&gt; &amp; c|waiting for data|10.0%|val_loss|0.125|CIDEr|0.25|run.init_lr|0.003|66.7%
        |left out: no text|&lt;script&gt;a cat|Step 90, val: exact is 7.1; before training it was 29.7
        |exact &lt;name&gt;|95 % interval|55.5|53.0 to 58.0|heldout: task match
        |1,594 answers|torch|python train.py --cfg-path|sample_ratio: 2"""
    for words in map(str.strip, words_of_the_page.split("|")):
        assert words in text, words
    page = re.sub("<details>.*?</details>", "", page, flags=re.DOTALL)  # with git's changes, which may say anything
    links = re.findall("""<[^>]*(?:src|href) *= *["']?([^"' >]*)""", page)
    assert "<script" not in page and links and all(link.startswith(("#", "data:")) for link in links)
    assert len(re.findall("<svg", page)) == 5 and "@import" not in page and "url(http" not in page
    assert ">6<" in page  # left out in both epochs


def test_pictures_are_beside_their_answers(folder):
    """Small, whatever their kind; those of no answer come last, and one that cannot be drawn is left out."""
    large, clear = Image.new("L", (4000, 1000)), Image.new("RGBA", (9, 9))
    names = {"val_picture/2": large, "val_picture/3": clear, "one/of 'my own' ü": clear, "x" * 300: clear}
    record = RunRecord(RunInfo("1", "run", str(folder), {}), [])
    record.log(101, {"val_answers": "1. a\n2. b\n3. c", **names})
    record.close()
    page = report.write_report(folder).read_text(encoding="utf-8")
    rows = re.findall("<li>(.*?)<span>(.*?)</span>", page)
    assert [(bool(element), text) for element, text in rows] == [(False, "1. a"), (True, "2. b"), (True, "3. c")]
    content = base64.b64decode(re.search('base64,([^"]*)', rows[1][0])[1])
    assert Image.open(io.BytesIO(content)).size == (160, 40) and len(content) < 2000
    assert "<figcaption>one/of &#x27;my own&#x27; ü" in page and page.count("<img") == 3 and large.size == (4000, 1000)


def test_the_report_leaves_a_picture_as_it_is(folder):
    """Pillow can read a small JPEG from a large one, but then the large one is gone, which trackers get next."""
    Image.new("RGB", (2000, 1000)).save(folder / "large.jpg")
    picture = Image.open(folder / "large.jpg")
    RunRecord(RunInfo("1", "run", str(folder), {}), []).log(101, {"a": picture})
    assert picture.size == (2000, 1000)


def test_without_matplotlib_the_curves_alone_are_missing(folder, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    page = report.write_report(folder).read_text(encoding="utf-8")
    assert "pip install matplotlib" in page and "<svg" not in page and "run.init_lr" in page


def test_a_report_that_fails_is_a_warning(folder, caplog):
    (folder / run_files.ENVIRONMENT).write_text("{")
    assert report.write_report(folder) is None
    assert "report.html was not written" in caplog.text and not (folder / report.NAME).exists()


@pytest.mark.parametrize("lines", ['{"step": 0, "test/val_loss": 0.4321}\n', "", None])
def test_a_run_without_training_or_without_numbers(folder, lines, caplog):
    """An evaluation alone; a run that was killed at its start; a plug-in's runner."""
    (folder / metrics.NAME).unlink()
    if lines is not None:
        (folder / metrics.NAME).write_text(lines)
    page = report.write_report(folder).read_text(encoding="utf-8").split("<h2>Environment")[0]  # git's changes
    assert ("0.4321" in page) == bool(lines) and "Curves" not in page and "run.init_lr" in page and not caplog.text


def test_lines_of_ones_own(folder):
    """A loss without the times of a step, a text in the place of a number, a name that is no formula."""
    file = metrics.MetricsFile(folder / metrics.NAME)
    file.write(101, {"loss": 0.5, "share/x": "a half", "cost in $ of {x": 2.0, "$ again": "b"})
    page = report.write_report(folder).read_text(encoding="utf-8")
    assert "cost in $ of {x" in page and "10.0%" in page


def test_the_command(folder, tmp_path, capsys):
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / report.NAME}\n"
    assert "has no metrics.jsonl" in main(["report", str(tmp_path)])
    described = json.loads((folder / run_files.ENVIRONMENT).read_text())
    assert described["changed_settings"]["run.init_lr"] == [0.0001, 0.003]
