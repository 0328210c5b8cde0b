"""Numbers in messages."""


def pluralize(count: int, one: str, several: str | None = None) -> str:
    """`1 file`, `2 files`, `1,500 steps`; `several`: a plural that is not `one` with an s."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"
