"""A list of many strings in two arrays."""

import hashlib
from collections.abc import Iterable

import numpy as np


class PackedStrings:
    """A read-only list of strings, held as one array of bytes and one of offsets.

    Data workers share the memory of arrays. A Python list of strings would be copied into every worker over time,
    because reading an object changes its reference count, and with it the memory page.
    """

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [s.encode("utf-8", errors="surrogatepass") for s in strings]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)

    def digest(self) -> str:
        """The beginning of the SHA-256 of all strings and their lengths."""
        return hashlib.sha256(self._bytes.tobytes() + self._ends.tobytes()).hexdigest()[:16]

    def select(self, chosen: np.ndarray) -> "PackedStrings":
        """The strings at which `chosen` (bool) is true."""
        return PackedStrings(self[index] for index in np.flatnonzero(chosen))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        """The string at `index` (negative: from the end). Raises IndexError outside."""
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return self._bytes[start : self._ends[index]].tobytes().decode("utf-8", errors="surrogatepass")
