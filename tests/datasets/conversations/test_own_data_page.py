"""The examples of docs/own_data.md, read out of the page."""

import re

import pytest
from helpers import ROOT

from minigpt4.datasets.conversations.formats import FORMS, read_records
from minigpt4.datasets.conversations.record import Picture

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
