"""Numbers in messages."""

from minigpt4.common.words import counted


def test_one_and_several():
    assert [counted(n, "file") for n in (0, 1, 2, 1500)] == ["0 files", "1 file", "2 files", "1,500 files"]
    assert [counted(n, "query", "queries") for n in (1, 32)] == ["1 query", "32 queries"]
