"""python -m minigpt4 plot: curves of runs in one picture."""

import re

import pytest
from PIL import Image

from minigpt4.__main__ import main
from minigpt4.common.errors import ConfigError
from minigpt4.tracking import plot


@pytest.fixture
def two(tmp_path, make_run):
    return [make_run(tmp_path / "output" / "1"), make_run(tmp_path / "output" / "2", 1, "a name", CIDEr=0.9)]


def test_two_runs_in_one_picture(two, tmp_path, capsys):
    out = tmp_path / "made" / "curves.png"
    assert main(["plot", *map(str, two), "--out", str(out)]) == 0
    assert "2 runs: loss, val_loss, CIDEr, lr, images_per_second" in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.width > 1000 and picture.height > 900
    first = out.read_bytes()
    assert main(["plot", str(two[0].parent), "--out", str(out), "--metrics", "loss"]) == 0  # the folder of both
    assert out.read_bytes() != first and [p.name for p in out.parent.iterdir()] == ["curves.png"]


def test_each_curve_has_the_numbers_of_its_run(two):
    runs = plot.find_runs(two)
    assert [run.name for run in runs] == ["output/1", "a name (2)"]
    figure = plot.draw(runs, ["val_loss", "lr"])
    panels = {panel.get_title(): panel for panel in figure.axes}
    curves = [line.get_xydata().tolist() for line in panels["val_loss"].lines if len(line.get_xdata())]
    assert curves == [[[50, 0.2], [100, 0.1]], [[50, 0.2]]]
    (lr, _) = [line.get_xydata() for line in panels["learning rate"].lines if len(line.get_xdata())]
    assert len(lr) == 100 and lr[-1].tolist() == pytest.approx([100, 0.01])


def test_a_digest_is_no_metric(make_run, tmp_path):
    run = plot.read_run(make_run(tmp_path / "1", samples="5f1e"))
    with pytest.raises(ConfigError, match="No run has the metric 'samples'. Known: (?!.*samples)"):
        plot.draw([run], ["samples"])


def test_a_long_curve_is_smoothed_without_a_shift(two):
    _, mean = plot.draw(plot.find_runs(two[:1]), ["images_per_second"]).axes[0].lines
    assert mean.get_ydata() == pytest.approx([92] * 100, abs=1.01)
    assert mean.get_xdata().tolist() == list(range(1, 101))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere is no folder of a run"),
        (["empty"], "was written yet"),
        (["run", "--metrics", "nope"], r"No run has the metric 'nope'. Known: .*val_loss"),
        (["run", "--out", "curves.pdf"], "ends in .png"),
        (["run", "--out", "mine.png"], "did not write it"),
        (["run", "--out", "metrics.png/x.png"], "cannot be written"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, make_run, arguments, words):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    Image.new("RGB", (2, 2)).save(tmp_path / "mine.png")
    (tmp_path / "metrics.png").touch()
    said = main(["plot", *arguments])
    assert re.search(words, said), said
    assert (tmp_path / "mine.png").stat().st_size < 200 and not (tmp_path / "plot.png").exists()


def test_without_matplotlib(tmp_path, monkeypatch, make_run):
    run = plot.find_runs([make_run(tmp_path / "run")])
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        plot.save_png(tmp_path / "plot.png", run, ["loss"])
