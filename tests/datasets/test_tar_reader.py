"""Samples from tars of every kind, by the stream that trains on them: what comes out, and what is counted."""

import bz2
import gzip
import io
import json
import logging
import lzma
import tarfile
from collections import Counter

import pytest
from dataset_files import good_members, picture_bytes, write_tar

from minigpt4.datasets.datasets import tar_reader
from minigpt4.datasets.datasets.image_text_stream import ImageTextStream
from minigpt4.processors import BaseProcessor


def read(*paths) -> tuple[dict[str, str], Counter]:
    """{key: caption} of the usable samples of shards, and the counts by cause of the rest."""
    stream = ImageTextStream(list(map(str, paths)), BaseProcessor(), BaseProcessor(), "laion")
    found = {raw.key: raw.caption for part in range(stream.num_parts) for raw in stream.part(part)}
    causes: Counter[str] = Counter()
    for (cause, _), count in stream.take_left_out().items():
        causes[cause] += count
    return found, causes


def pairs(*keys: str) -> list[tuple[str, bytes]]:
    """A picture and a .txt with its key for each key."""
    return [m for key in keys for m in ((f"{key}.jpg", picture_bytes(0, format="JPEG")), (f"{key}.txt", key.encode()))]


KEYS = ("0001", "0002", "0003")


def mac(name: str) -> list[tuple[str, bytes]]:
    folder, _, file = name.rpartition("/")
    return [(f"{folder}/._{file}" if folder else f"._{file}", b"\0\x05\x16\x07" + bytes(60))]


@pytest.mark.parametrize("folder", ["", "./d/", "d/e/"])
@pytest.mark.parametrize(
    "companions",
    [
        mac,
        lambda name: [(f"__MACOSX/{name}", b"x")],
        lambda name: [(f"{name.rpartition('/')[0] or '.'}/.DS_Store", b"x")],
        lambda name: [("Thumbs.db", b"x")],
        lambda name: [("README.md", b"x")],
    ],
    ids=["._", "__MACOSX", ".DS_Store", "Thumbs.db", "README"],
)
def test_files_between_the_members_of_a_sample(tmp_path, folder, companions):
    keys = [folder + key for key in KEYS]
    members = [m for name, content in pairs(*keys) for m in (*companions(name), (name, content))]
    assert read(write_tar(tmp_path / "0.tar", members)) == ({key: key for key in keys}, {})


@pytest.mark.parametrize(
    "key", ["photo v2.0 (final)", "d.1/a.b.c", "1.5.jpg copy", "x.", "a..b", "..a/b.c", ".cache/imgs/1"]
)
def test_dots_in_names(tmp_path, key):
    found, causes = read(write_tar(tmp_path / "0.tar", pairs(f"{key} 1", f"{key} 2")))
    assert found == {f"{key} 1": f"{key} 1", f"{key} 2": f"{key} 2"} and causes == {}


def test_texts_called_after_the_picture_file(tmp_path):
    picture = picture_bytes(0, format="JPEG")
    members = [("a.JPG", picture), ("a.JPG.txt", b"A"), ("b.2.jpeg", picture), ("b.2.jpeg.json", b'{"caption": "B"}')]
    assert read(write_tar(tmp_path / "0.tar", members)) == ({"a": "A", "b.2": "B"}, {})


ORDERS = {
    "pictures first": lambda m: m[0::2] + m[1::2],
    "texts first": lambda m: m[1::2] + m[0::2],
    "backwards": lambda m: m[::-1],
    "pictures first, texts backwards": lambda m: m[0::2] + m[1::2][::-1],
}


@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_members(tmp_path, order):
    members = ORDERS[order](pairs(*KEYS))
    assert read(write_tar(tmp_path / "0.tar", members)) == ({key: key for key in KEYS}, {})


def test_a_json_without_caption_waits_for_the_text(tmp_path):
    members = good_members(0, 3)
    images, records, texts = members[0::3], [(name, b'{"caption": null}') for name, _ in members[1::3]], members[2::3]
    assert read(write_tar(tmp_path / "0.tar", images + records + texts))[1] == {}


def test_numbers_that_begin_again_are_other_samples(tmp_path):
    """Tars joined into one."""
    first, second = pairs(*KEYS), [(name, b"again" if name.endswith("txt") else m) for name, m in pairs(*KEYS)]
    stream = ImageTextStream(str(write_tar(tmp_path / "0.tar", first + second)), BaseProcessor(), BaseProcessor())
    assert [sample.caption for sample in stream.part(0)] == [*KEYS, "again", "again", "again"]


def test_late_files_of_a_complete_sample_are_no_sample(tmp_path):
    members = [m for m in good_members(0, 3) if not m[0].endswith("txt")]
    texts = [m for m in good_members(0, 3) if m[0].endswith("txt")]
    found, causes = read(write_tar(tmp_path / "0.tar", members + texts))
    assert len(found) == 3 and causes == {}


def test_other_files_of_a_complete_sample_are_no_sample(tmp_path):
    picture = picture_bytes(0)
    members = [(f"{i}.{end}", c) for i in "12" for end, c in (("jpg", picture), ("meta.json", b"{}"), ("txt", b"text"))]
    members += [("1.mask.png", picture)]
    assert read(write_tar(tmp_path / "0.tar", members)) == ({"1": "text", "2": "text"}, {})


def test_members_too_far_apart_are_left_out_and_the_distance_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_reader, "MAX_WAITING", 1 << 20)
    large = [
        (name, content + bytes(300_000) if name.endswith("jpg") else content) for name, content in pairs(*"abcdef")
    ]
    found, causes = read(write_tar(tmp_path / "0.tar", large[0::2] + large[1::2]))
    assert set(found) == set("def")
    assert causes['a sample without caption (.json with "caption", or .txt) within 1 MB of it in the tar'] == 3


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".x"])
@pytest.mark.parametrize(
    "compress",
    [gzip.compress, bz2.compress, lzma.compress, lambda c: gzip.compress(c[:9000]) + gzip.compress(c[9000:])],
    ids=["gzip", "bz2", "xz", "gzip in two parts"],
)
def test_compressed_tars_under_any_name(tmp_path, compress, suffix):
    plain = write_tar(tmp_path / "plain", good_members(0, 10))
    path = tmp_path / f"0{suffix}"
    path.write_bytes(compress(plain.read_bytes()))
    found, causes = read(path)
    assert found == {f"{i:09d}": f"Sample {i}." for i in range(10)} and causes == {}
    found, causes = read(f"pipe:cat {path}")
    assert len(found) == 10 and causes == {}


def damaged(kind: str, good: bytes) -> bytes:
    cut = good[: len(good) // 2 + 100]
    kinds = {
        "empty": b"",
        "no tar": b"version https://git-lfs.github.com/spec/v1\n" * 50,
        "no members": bytes(10240),
        "cut in a picture": cut,
        "cut between members": good[: 512 * 4],
        "cut in a header": good[: 512 * 4 + 100],
        "no end": good.rstrip(b"\0") + bytes(-len(good.rstrip(b"\0")) % 512),
        "a broken header": good[: 512 * 12] + b"\xff" * 2048 + good[512 * 16 :],
        "a cut gzip": gzip.compress(good)[:-200],
        "gzip of a cut tar": gzip.compress(cut),
        "a flipped byte in a gzip": gzip.compress(good)[:-8] + b"\0\0\0\0" + gzip.compress(good)[-4:],
    }
    return kinds[kind]


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("empty", "a shard, or a part of it, that cannot be read"),
        ("no tar", "a shard, or a part of it, that cannot be read"),
        ("no members", "a shard without samples"),
        ("cut in a picture", "the rest of a tar that was cut off"),
        ("cut between members", "the rest of a tar that was cut off"),
        ("cut in a header", "the rest of a tar that was cut off"),
        ("no end", "the rest of a tar that was cut off"),
        ("a broken header", "the rest of a corrupt tar"),
        ("a cut gzip", "the rest of a tar that was cut off"),
        ("gzip of a cut tar", "the rest of a tar that was cut off"),
        ("a flipped byte in a gzip", "the rest of a corrupt tar"),
    ],
)
@pytest.mark.parametrize("pipe", [False, True])
def test_a_damaged_shard_counts_once(tmp_path, kind, cause, pipe):
    path = tmp_path / "0.tar"
    path.write_bytes(damaged(kind, write_tar(tmp_path / "good", good_members(0, 10)).read_bytes()))
    found, causes = read(f"pipe:cat {path}" if pipe else path)
    assert causes == {cause: 1}
    assert set(found) <= {f"{i:09d}" for i in range(10)}


def test_the_cause_of_a_shard_without_samples_is_named_in_few_words(tmp_path, caplog):
    members = [(f"picture {i}.gif", b"GIF89a") for i in range(3000)]
    write_tar(tmp_path / "0.tar", members)
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path / "0.tar") == ({}, {"a shard without samples": 1})
    (record,) = caplog.records
    assert "picture 2999 has .gif" in record.getMessage() and len(record.getMessage()) < 400


def test_warnings_are_short_and_few(tmp_path, caplog):
    """A sample with many files: the warning about it had 230,134 characters."""
    members = [("a.jpg", b"x"), *((f"a.{i}", b"") for i in range(500))]
    stream = ImageTextStream(str(write_tar(tmp_path / "0.tar", members)), BaseProcessor(), BaseProcessor())
    with caplog.at_level(logging.WARNING):
        assert [list(stream.part(0)) for _ in range(12)] == [[]] * 12
    assert len(caplog.records) == 2  # the 1st and the 10th
    assert max(len(record.getMessage()) for record in caplog.records) < 600


def test_bad_captions_are_counted_by_cause(tmp_path):
    captions = [
        ("json", json.dumps({"caption": "fine"}).encode()),
        ("json", b'{"caption": "\\ud83d"}'),
        ("json", b"[" * 100_000),
        ("txt", "café".encode("latin-1")),
        ("txt", "UTF-16\r\n".encode("utf-16")),
        ("txt", b" \n"),
        ("json", b'{"caption": ["a", "list"]}'),
        ("txt", "\ufeffmarked".encode()),
    ]
    members = []
    for i, (suffix, content) in enumerate(captions):
        members += [(f"{i}.png", picture_bytes(i)), (f"{i}.{suffix}", content)]
    found, causes = read(write_tar(tmp_path / "0.tar", members))
    assert found == {"0": "fine", "4": "UTF-16\r\n", "7": "marked"}
    assert causes == {
        "a caption with lone surrogates or control characters": 1,
        "a JSON file that is nested too deeply": 1,
        "a caption that is not in UTF-8 (nor in UTF-16 with a byte-order mark)": 1,
        "an empty caption": 1,
        "a caption that is not a text": 1,
    }


def test_links_are_named(tmp_path, caplog):
    """What tar writes for the second of two hard links."""
    with tarfile.open(write_tar(tmp_path / "0.tar", pairs("1")), "a") as tar:
        link = tarfile.TarInfo("2.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "1.jpg"
        tar.addfile(link)
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("2.txt"))
    assert read(tmp_path / "0.tar")[1] == {"a sample without picture (.jpg, .jpeg, .png, .webp)": 1}
    assert "2 has .jpg (a link), .txt" in caplog.text


def test_zstd_is_named(tmp_path, caplog):
    (tmp_path / "0.tar").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(1000))
    assert read(tmp_path / "0.tar")[1] == {tar_reader.UNREADABLE: 1}
    assert "zstd -d" in caplog.text


def test_two_samples_of_one_name(tmp_path):
    members = [("x.jpg", b"1"), ("x.txt", b"one"), ("x.jpg", b"2"), ("x.txt", b"two")]
    with open(write_tar(tmp_path / "0.tar", members), "rb", buffering=0) as file:
        found = tar_reader.read_members(file, ["jpg"])
        samples = [*tar_reader.read_samples(found, lambda group: dict(group.files), lambda *dropped: None)]
    assert samples == [{"jpg": b"1", "txt": b"one"}, {"jpg": b"2", "txt": b"two"}]


def test_tars_joined_by_cat_are_named(tmp_path):
    first, second = (write_tar(tmp_path / f"{name}.tar", pairs(name)) for name in "ab")
    (tmp_path / "c.tar").write_bytes(first.read_bytes() + second.read_bytes())
    assert read(tmp_path / "c.tar") == ({"a": "a"}, {tar_reader.JOINED: 1})


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_tarfile_reads(tmp_path, form):
    """Plain ones, and from an unusual one on all others. Of a tar that is cut off, those up to there."""
    names = ["a.jpg", "a.txt", "d" * 60 + "/" + "e" * 60 + "/b.jpg", "é.jpg", "c.mp4", "x" * 90 + "/y.txt", "z.json"]
    for unusual in ([], ["folder/"] if form == tarfile.USTAR_FORMAT else ["l" * 300 + ".jpg"]):
        path = tmp_path / "0.tar"
        with tarfile.open(path, "w", format=form) as tar:
            for number, name in enumerate([*names[:4], *unusual, *names[4:]]):
                info = tarfile.TarInfo(name)
                info.type = tarfile.DIRTYPE if name == "folder/" else tarfile.REGTYPE
                info.size, info.mtime = 0 if name == "folder/" else 400 * number, 1.5e9 + number / 4
                tar.addfile(info, io.BytesIO(name[0].encode("latin-1") * info.size))
        with tarfile.open(path) as tar:
            expected = [(info.name, tar.extractfile(info).read()) for info in tar if info.isreg()]
        content = path.read_bytes()
        for end in range(0, len(content) + 1, 256):
            found, problem = [], ""
            try:
                for key, suffix, data, _ in tar_reader.read_members(io.BytesIO(content[:end]), ["jpg", "mp4"]):
                    found.append((f"{key}.{suffix}", data))
            except tar_reader.ShardError as error:
                problem = error.cause
            assert found == expected[: len(found)]
            assert problem or found == expected
        assert not problem


def test_a_header_that_is_cut_off_is_no_member():
    """It ends in zeros, so its checksum is right without them."""
    header = tarfile.TarInfo("a.txt").tobuf(tarfile.USTAR_FORMAT)[:400]
    with pytest.raises(tar_reader.ShardError):
        assert not next(tar_reader.read_members(io.BytesIO(header), ["jpg"]))
