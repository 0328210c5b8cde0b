"""Many strings in two arrays."""

from collections.abc import Iterable

import numpy as np


class PackedStrings:
    """A read-only list of strings, held as one array of bytes and one of offsets.

    A Python list of strings is copied into every worker bit by bit, because reading an object writes its reference
    count; arrays stay shared.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [s.encode("utf-8", errors="surrogatepass") for s in strings]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        """The string at `index` (negative: from the end). Raises IndexError outside."""
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return self._bytes[start : self._ends[index]].tobytes().decode("utf-8", errors="surrogatepass")
