"""Data with one fault of each kind, at known places."""

import io
import json
from pathlib import Path

import numpy as np
from dataset_files import good_members, picture_bytes, write_tar
from PIL import Image, ImageFilter


def photo(seed: int, size: tuple[int, int] = (240, 180)) -> Image.Image:
    """A picture with large and small structures, sharp."""
    rng = np.random.default_rng(seed)
    large = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    fine = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    return Image.blend(large, fine, 0.2)


def content(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def write_faulty_jsonl(folder: Path) -> Path:
    """A .jsonl whose faults are on the lines of `LINES`."""
    for number in range(8):
        (folder / f"{number}.jpg").write_bytes(content(photo(number), quality=95))
    original = photo(1)
    (folder / "small.jpg").write_bytes(content(original.resize((160, 120)), quality=80))
    (folder / "blurred.jpg").write_bytes(content(photo(20).filter(ImageFilter.GaussianBlur(9))))
    (folder / "white.png").write_bytes(content(Image.new("RGB", (64, 64), "white"), "PNG"))
    (folder / "cut_off.jpg").write_bytes(content(photo(21), quality=95)[:9000])
    (folder / "text.jpg").write_bytes(b"no picture at all")
    records = [
        {"id": "one", "image": "0.jpg", "caption": "A first caption."},
        {"image": "1.jpg", "caption": "A second caption."},
        {"image": "gone.jpg", "caption": "Its picture is not there."},
        {"image": "cut_off.jpg", "caption": "Half of a picture."},
        {"image": "text.jpg", "caption": "No picture."},
        {"image": "2.jpg", "caption": "   "},
        {"image": "1.jpg", "caption": "A second caption."},
        {"id": "one", "image": "3.jpg", "caption": "Another one."},
        {"image": "small.jpg", "caption": "The second picture, smaller."},
        {"image": "blurred.jpg", "caption": "Fog."},
        {"image": "white.png", "caption": "Snow."},
        {"image": "4.jpg", "caption": "word " * 200},
        {"prompt": "Who wrote Faust?", "answer": "Goethe."},
        {"image": "5.jpg", "caption": "A text with ###Human: in it."},
        {"image": "6.jpg"},
        {"image": "6.jpg", "caption": "A text with a \0 in it."},
    ]
    path = folder / "faulty.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


LINES = {
    "mistake": [3, 15],
    "text": [6, 16],
    "picture": [4, 5],
    "doubled": [7],
    "doubled_id": [8],
    "copy": [9],
    "blurred": [10],
    "flat": [11],
    "no_picture": [13],
}


def write_faulty_shards(folder: Path) -> Path:
    """Shards: whole, not in order, cut off, without samples, with a stranger, and of no tar at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tar(folder / "0_whole.tar", good_members(0, 6))
    members = good_members(10, 3)
    write_tar(folder / "1_unsorted.tar", sorted(members, key=lambda member: member[0].rpartition(".")[2]))
    whole = write_tar(folder / "2_cut_off.tar", good_members(20, 6)).read_bytes()
    (folder / "2_cut_off.tar").write_bytes(whole[: len(whole) // 2])
    write_tar(folder / "3_empty.tar", [("README.md", b"none")])
    bad = [("000000040.png", picture_bytes(40)), ("000000041.png", b"broken"), ("000000041.txt", b"A caption.")]
    write_tar(folder / "4_members.tar", [*good_members(30, 3), *bad, ("statistics.csv", b"1,2")])
    (folder / "5_no_tar.tar").write_bytes(b"<html>404</html>" * 100)
    return folder
