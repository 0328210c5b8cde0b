"""`data check` finds every fault that was planted, at its place, and no other."""

import base64
import json
import sys
from types import SimpleNamespace

import pytest
from dataset_files import good_members, write_align, write_shards, write_tar
from faulty_data import LINES, photo, write_faulty_jsonl, write_faulty_shards
from helpers import ROOT

from minigpt4.cli.data import main
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.data_tools.check import check
from minigpt4.data_tools.findings import KINDS
from minigpt4.data_tools.lengths import lengths_of
from minigpt4.data_tools.opening import sources_of_config

STAGE = {n: str(ROOT / f"train_configs/minigpt4_tiny_{n}.yaml") for n in ("stage1_pretrain", "stage2_finetune")}


class Run:
    """Runs `data check` in this process."""

    def __init__(self, folder, capsys) -> None:
        self.folder, self.capsys = folder, capsys

    def __call__(self, *arguments, workers: int = 1) -> list[dict]:
        """The datasets of its report."""
        arguments = ["check", *map(str, arguments), "--out", str(self.folder), "--workers", str(workers)]
        self.status = main(arguments)
        self.text = self.capsys.readouterr().out
        self.page = (self.folder / "index.html").read_text(encoding="utf-8")
        return json.loads((self.folder / "report.json").read_text(encoding="utf-8"))["datasets"]


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    return Run(tmp_path / "report", capsys)


def places(dataset: dict) -> dict[str, list[str]]:
    """{kind: places} of the findings."""
    found: dict[str, list[str]] = {}
    for finding in dataset["findings"]:
        assert KINDS[finding["kind"]].level == finding["level"]
        found.setdefault(finding["kind"], []).append(finding["where"])
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_each_fault_of_a_file_is_found_on_its_line(run, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("minigpt4.data_tools.sources.PART", 5)
    path = write_faulty_jsonl(tmp_path)
    (data,) = run(path, workers=workers)
    found = {kind: [int(where.split()[2]) for where in wheres] for kind, wheres in places(data).items()}
    assert found == LINES
    assert (data["records"], data["usable"], data["pictures"]) == (16, 10, 8)
    assert run.status == 1 and "6 errors, 5 warnings." in run.text


def test_a_finding_names_what_it_is_about(run, tmp_path):
    (data,) = run(write_faulty_jsonl(tmp_path))
    what = {(finding["kind"], finding["where"].split()[2]): finding["what"] for finding in data["findings"]}
    assert "gone.jpg" in what["mistake", "3"] and "cut_off.jpg" in what["picture", "4"]
    assert "faulty.jsonl line 2" in what["doubled", "7"] and "faulty.jsonl line 1" in what["doubled_id", "8"]
    assert "line 2 1.jpg" in what["copy", "9"]


def test_tokens_that_are_cut(run, tmp_path):
    """Lengths are those of the tokenizer, and the two bounds that are named do what they promise."""
    write_align(tmp_path, records=12)
    annotations = [{"image_id": str(i), "caption": "word " * (10 if i else 300)} for i in range(12)]
    (tmp_path / "filter_cap.json").write_text(json.dumps({"annotations": annotations}))
    storage = f"datasets.cc_sbu_align.build_info.storage={tmp_path}"
    (data,) = run("--cfg-path", STAGE["stage2_finetune"], "--options", storage)
    lengths = data["lengths"]
    assert lengths["unit"] == "token" and lengths["cut"] == 1 and lengths["lost"] == lengths["most"] - 160
    assert places(data)["cut"] == [f"{tmp_path}/filter_cap.json annotations[0]"] and run.status == 0
    cfg = Config(SimpleNamespace(cfg_path=STAGE["stage2_finetune"], options=[storage]))
    (source,), (measure, _) = sources_of_config(cfg), lengths_of(cfg)
    for max_txt_len, cut in ((lengths["most"], 0), (lengths["most"] - 1, 1)):
        measure.max_txt_len = max_txt_len
        assert (check(source, measure, 1).rows["lost"] > 0).sum() == cut


def test_faults_of_shards(run, tmp_path):
    folder = write_faulty_shards(tmp_path / "shards")
    storages = [f"datasets.{name}.build_info.storage={folder}/*.tar" for name in ("laion", "cc_sbu")]
    data, _ = run("--cfg-path", STAGE["stage1_pretrain"], "--options", *storages)
    found = {kind: [where.removeprefix(f"{folder}/") for where in wheres] for kind, wheres in places(data).items()}
    assert found == {
        "shard": ["2_cut_off.tar", "5_no_tar.tar"],
        "empty_shard": ["3_empty.tar", "5_no_tar.tar"],
        "left_out": ["4_members.tar member 000000040"],
        "picture": ["4_members.tar member 000000041"],
        "unsorted": ["1_unsorted.tar"],
        "orphan": ["3_empty.tar member README", "4_members.tar member statistics"],
    }


def test_data_without_faults(run, tmp_path):
    write_shards(tmp_path / "laion", count=2, samples=5)
    write_shards(tmp_path / "cc_sbu", count=1, samples=5)
    storages = [f"datasets.{name}.build_info.storage={tmp_path}/{name}/*.tar" for name in ("laion", "cc_sbu")]
    datasets = run("--cfg-path", STAGE["stage1_pretrain"], "--options", *storages, workers=2)
    assert [(data["name"], data["usable"]) for data in datasets] == [("laion", 10), ("cc_sbu", 5)]
    assert run.status == 0 and "0 errors" in run.text


def test_pictures_without_texts_are_looked_at(run, tmp_path):
    photo(0).save(tmp_path / "a.png")
    photo(0).save(tmp_path / "b.jpg", quality=80)
    (tmp_path / "c.jpg").write_bytes(b"none")
    (data,) = run(tmp_path)
    found = {kind: [where.removeprefix(f"{tmp_path}/") for where in wheres] for kind, wheres in places(data).items()}
    expected = {"mistake": ["a.png", "b.jpg", "c.jpg"], "picture": ["c.jpg"], "copy": ["b.jpg"]}
    assert found == expected | {"nothing": [f"{tmp_path}, read as folder"]}
    assert run.page.count("data:image/jpeg;base64,") == 2 and data["records"] == 3


def test_a_file_of_several_records_is_looked_at_once(run, tmp_path):
    """Also the pictures of one record: a file, and one inside the data."""
    (tmp_path / "broken.jpg").write_bytes(b"none")
    photo(1).save(tmp_path / "good.png")
    inside = "data:image/png;base64," + base64.b64encode(b"none").decode()
    records = [{"image": "broken.jpg", "caption": f"Number {number}."} for number in range(3)]
    records += [{"image": "good.png", "caption": f"Number {number}."} for number in range(2)]
    records.append({"images": ["good.png", inside], "prompt": "<image><image>?", "answer": "Two."})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (data,) = run(tmp_path / "a.jsonl")
    assert [where.split()[2] for where in places(data)["picture"]] == ["6", "1"]
    assert "3 records" in data["findings"][1]["what"]
    assert (data["records"], data["usable"], data["pictures"]) == (6, 2, 1)


def test_nothing_usable(run, tmp_path):
    write_tar(tmp_path / "0.tar", good_members(0, 2)[2:3])
    (data,) = run(tmp_path / "0.tar")
    assert "nothing" in places(data) and data["usable"] == 0 and run.status == 1


def test_a_plug_in_is_read_as_its_contract_says(run, tmp_path, monkeypatch):
    (tmp_path / "own_pictures.py").write_text(
        """
import torch
from minigpt4.common.registry import registry
from minigpt4.datasets.builders import BaseDatasetBuilder

class Own(torch.utils.data.Dataset):
    def __len__(self):
        return 5
    def __getitem__(self, index):
        if index == 3:
            raise KeyError("gone")
        image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(index))
        return {"image": image, "text_input": "" if index == 4 else f"Number {index}."}

@registry.register_builder("own_pictures")
class OwnBuilder(BaseDatasetBuilder):
    name = "own_pictures"
    def build(self):
        return {"train": Own()}
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = tmp_path / "own.yaml"
    config.write_text("model: {arch: mini_gpt4, model_type: tiny}\ndatasets: {own_pictures: {}}\n")
    (data,) = run("--cfg-path", config, "--import", "own_pictures")
    assert places(data) == {"mistake": ["own_pictures[3]"], "text": ["own_pictures[4]"]}
    assert (data["usable"], data["pictures"]) == (3, 3)


def test_a_plug_in_with_parts_is_read_to_its_end(run, tmp_path, monkeypatch):
    (tmp_path / "own_shards.py").write_text(
        """
from minigpt4.common.registry import registry
from minigpt4.datasets.builders import LaionBuilder

@registry.register_builder("own_shards")
class OwnShardsBuilder(LaionBuilder):
    name, DATASET_CONFIG_DICT = "own_shards", {}
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    broken = [("000000009.png", b"broken"), ("000000009.txt", b"A caption.")]
    write_tar(tmp_path / "0.tar", [*good_members(0, 3), *broken])
    config = tmp_path / "own.yaml"
    config.write_text(
        "model: {arch: mini_gpt4, model_type: tiny}\n"
        f"datasets: {{own_shards: {{build_info: {{storage: {tmp_path}/0.tar}}}}}}\n"
    )
    (data,) = run("--cfg-path", config, "--import", "own_shards")
    assert places(data)["mistake"] == ["own_shards 0.tar/000000009"]
    assert (data["usable"], data["pictures"]) == (3, 3)


def test_the_page_needs_no_network_and_shows_texts_as_texts(run, tmp_path):
    photo(0).save(tmp_path / "a.jpg")
    (tmp_path / "a.jsonl").write_text('{"image": "<script>alert(1)</script>.jpg", "caption": "x"}\n')
    run(tmp_path / "a.jsonl")
    assert "<script" not in run.page and "&lt;script&gt;" in run.page
    assert "http://" not in run.page and "https://" not in run.page


def test_worst_first_with_thumbnails(run, tmp_path):
    run(write_faulty_jsonl(tmp_path))
    assert run.page.count("data:image/jpeg;base64,") == 2 + 1 + 1  # two of the copies, a blurred and a white picture


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--cfg-path"),
        (["a.jsonl", "--cfg-path", "b.yaml"], "--cfg-path"),
        (["a.jsonl", "--workers", "0"], "--workers 0"),
        (["--cfg-path", "b.yaml", "--images", "c"], "--images"),
    ],
)
def test_arguments_that_do_not_fit(arguments, words, capsys):
    with pytest.raises(SystemExit) as end:
        main(["check", *arguments])
    assert end.value.code == 2 and words in capsys.readouterr().err


def test_missing_opencv_is_said_once_before_anything_is_read(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ConfigError, match="pip install opencv-python-headless"):
        run(write_faulty_jsonl(tmp_path))
    assert not run.folder.exists()


def test_a_folder_of_another_is_left_alone(tmp_path):
    (tmp_path / "report.json").write_text('{"mine": true}')
    with pytest.raises(ConfigError, match="Nothing was changed"):
        main(["check", "nothing", "--out", str(tmp_path)])
    assert (tmp_path / "report.json").read_text() == '{"mine": true}'


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="nothing.csv: there is no file") as error:
        main(["check", str(tmp_path / "nothing.csv")])
    assert "datasets." not in str(error.value)
    with pytest.raises(ConfigError, match="no file matches") as error:
        main(["check", str(tmp_path / "*.jsonl")])
    assert "datasets." not in str(error.value)


@pytest.mark.parametrize("val", [1.5, -1, "/none.jsonl"])
def test_a_share_that_is_none(tmp_path, val):
    (tmp_path / "a.jsonl").write_text('{"prompt": "Q", "answer": "A"}')
    info = f"{{storage: {tmp_path}/a.jsonl, val: {val}}}"
    (tmp_path / "run.yaml").write_text(
        "model: {arch: mini_gpt4, model_type: tiny}\n"
        f"datasets: {{mine: {{builder: conversation, build_info: {info}}}}}\n"
    )
    with pytest.raises(ConfigError, match=f"datasets.mine.build_info.val={val}"):
        main(["check", "--cfg-path", f"{tmp_path}/run.yaml"])


def test_a_table_with_other_columns_names_the_flags_and_they_help(run, tmp_path):
    photo(0).save(tmp_path / "a.png")
    table = tmp_path / "my.csv"
    table.write_text("picture,words\na.png,A dog.\n")
    with pytest.raises(ConfigError, match="--columns image=… with --columns caption=…"):
        run(table)
    with pytest.raises(ConfigError, match="--columns caption=word is no column"):
        run(table, "--columns", "image=picture", "--columns", "caption=word")
    (data,) = run(table, "--columns", "image=picture", "--columns", "caption=words")
    assert data["usable"] == 1
    with pytest.raises(ConfigError, match=r"^\[.*my.csv.*a.tar'\] has shards and files"):
        run(table, tmp_path / "a.tar")
    (tmp_path / "gone.csv").write_text("image,caption\nnone.png,A dog.\n")
    with pytest.raises(ConfigError, match=r"none.png.* --images, names another folder"):
        main(["convert", f"{tmp_path}/gone.csv", "--to", "jsonl", "--out", f"{tmp_path}/out"])


@pytest.mark.parametrize(("limit", "line"), [(20, "max_txt_len=20 cuts no sample"), (3, "max_txt_len=3 cuts 100.0 %")])
def test_lengths_say_where_they_begin(run, tmp_path, limit, line):
    photo(0).save(tmp_path / "a.png")
    (tmp_path / "my.jsonl").write_text(
        json.dumps({"image": "a.png", "prompt": "Which animal is this?", "answer": "A dog."})
    )
    config = tmp_path / "my_run.yaml"
    model = (
        f'{{model_type: tiny, max_txt_len: {limit}, template: vicuna_v0, prompt_path: "{ROOT}/prompts/alignment.txt"}}'
    )
    config.write_text(
        f"model: {model}\ndatasets: {{own: {{builder: conversation, build_info: {{storage: {tmp_path}/my.jsonl}}}}}}\n"
    )
    (data,) = run("--cfg-path", config)
    assert line in run.text
    most = data["lengths"]["most"]
    assert f"lengths after the first question: {most} to {most} tokens" in run.text
