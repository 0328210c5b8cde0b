"""Numbers in messages."""

from minigpt4.common.text import pluralize


def test_one_and_several():
    assert [pluralize(n, "file") for n in (0, 1, 2, 1500)] == ["0 files", "1 file", "2 files", "1,500 files"]
    assert [pluralize(n, "query", "queries") for n in (1, 32)] == ["1 query", "32 queries"]
