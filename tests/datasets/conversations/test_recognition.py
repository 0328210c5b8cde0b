"""The format is recognised by content, whatever the file's name; importing the readers loads nothing heavy."""

import json
import subprocess
import sys

import pytest
from helpers import PYTHONPATH

from minigpt4.datasets.conversations.formats import FORMS, recognise

TURNS = [{"from": "human", "value": 'He said "messages": x'}, {"from": "gpt", "value": "A"}]
ROLES = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
URL = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.jpg"}}]}, ROLES[1]]
COCO = {"info": {}, "images": [{"id": 1}], "annotations": []}


@pytest.mark.parametrize(
    ("content", "format"),
    [
        ({"image": "a.jpg", "caption": "x"}, "jsonl"),
        ({"caption": 'He said "conversations": x', "image": "a.jpg"}, "jsonl"),
        ([{"image": "a.jpg", "prompt": "x", "answer": "y"}], "jsonl"),
        ({"messages": ROLES, "images": ["a.jpg"]}, "jsonl"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "a.jpg"}]}, ROLES[1]]}, "jsonl"),
        ({"conversations": TURNS, "image": "a.jpg"}, "llava"),
        ([{"conversations": TURNS}, {"conversations": TURNS, "image": "a.jpg"}], "llava"),
        ([{"conversations": TURNS, "images": ["a.jpg"]}], "sharegpt"),
        ([{"conversations": ROLES}], "sharegpt"),
        ({"images": [{"path": "a.jpg"}], "messages": ROLES}, "jsonl"),
        ({"image": "a.jpg", "caption": "x", "annotations": [{"box": 1}]}, "jsonl"),
        ({"image": "data:image/png;base64," + "A" * (2 << 20), "caption": "x"}, "jsonl"),
        ({"messages": URL}, "openai"),
        ([{"messages": ROLES}], "openai"),
        (COCO, "coco"),
        ({"annotations": [{"id": 1}]}, "coco"),
        ("a.jpg#0\tA cat, or a dog\n", "flickr"),
        ("image_name| comment_number| comment\n", "flickr"),
        ("image_name,comment_number,comment\n", "flickr"),
        ("image,caption\n", "csv"),
        ("image;caption\n", "csv"),
        ("image\tcaption, long\n", "tsv"),
        (b"PAR1\x15\x04", "parquet"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_recognised(tmp_path, content, format, encoding):
    if isinstance(content, bytes):
        (tmp_path / "data.bin").write_bytes(content)
    else:
        text = content if isinstance(content, str) else json.dumps(content, indent=1 if format == "coco" else None)
        (tmp_path / "data.bin").write_text(text, encoding=encoding)
    assert recognise(str(tmp_path / "data.bin")) == format
    assert recognise(str(tmp_path)) == "folder"
    assert format in FORMS


def test_nothing_heavy_is_imported():
    code = (
        "import sys, minigpt4.datasets.conversations.formats\n"
        "print({'torch', 'transformers', 'pyarrow', 'pycocotools', 'webdataset', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": PYTHONPATH}, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
