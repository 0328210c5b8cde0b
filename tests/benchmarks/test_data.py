"""python -m minigpt4 bench data."""

import io
import json

import pytest
from dataset_files import write_shards
from PIL import Image

from minigpt4.__main__ import main
from minigpt4.benchmarks.data import FIRST_RELEASE, OURS
from minigpt4.benchmarks.synthetic import photograph


def rows(capsys, *arguments) -> list[dict]:
    assert main(["bench", "data", "--count", "3", "--rounds", "1", "--json", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_synthetic_photographs(capsys):
    found = rows(capsys)
    by_way = {row["way"]: row for row in found if row["work"] == "256 px"}
    assert {row["work"] for row in found} == {"256 px", "400-1000 px"}
    assert {FIRST_RELEASE, OURS} < set(by_way)
    for row in found:
        assert row["min"] <= row["images_per_core_s"] <= row["max"] and row["min"] > 0
    assert by_way[OURS]["max_levels"] <= 2 and by_way[OURS]["mean_levels"] < 0.01
    assert "max_levels" not in by_way[FIRST_RELEASE]


def test_shards_through_the_loader(capsys, tmp_path):
    write_shards(tmp_path / "shards", count=2, samples=20)
    found = rows(capsys, "--shards", f"{tmp_path}/shards/{{00000..00001}}.tar", "--workers", "1", "--batch-size", "4")
    assert [row["work"] for row in found if "way" not in row] == ["stream of the shards", "loader"]
    assert {row["work"] for row in found if "way" in row} == {"pictures of the shards"}
    assert found[-1]["images_per_s"] > 0 and found[-1]["workers"] == 1


def test_lines_for_people(capsys):
    assert main(["bench", "data", "--count", "1", "--rounds", "1"]) == 0
    assert "images_per_core_s: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--count", "0"], "--count 0 must be more than 0"), (["--workers", "2"], "--workers needs --shards")],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "data", *arguments])
    assert message in capsys.readouterr().err


def test_missing_shards(tmp_path):
    pattern = f"{tmp_path}/{{0..1}}.tar"
    message = main(["bench", "data", "--shards", pattern])
    assert message.startswith(f"Error: --shards {pattern}: ") and f"{tmp_path}/0.tar" in message


def test_shards_on_another_machine():
    url = "https://host/0.tar"
    assert f"--shards {url}: only files on this machine" in main(["bench", "data", "--shards", url])


def test_photographs_repeat_and_differ():
    assert photograph(1, 40, 30) == photograph(1, 40, 30) != photograph(2, 40, 30)
    picture = Image.open(io.BytesIO(photograph(1, 40, 30)))
    assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (40, 30))
