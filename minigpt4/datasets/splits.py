"""The split "val": a share of the records, drawn by what they are, so that it never moves when others are added."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from minigpt4.common.errors import ConfigError


def in_share(identity: str, share: float) -> bool:
    """Whether a record belongs to a share (0 to 1) of all records. Its identity alone decides."""
    digest = hashlib.sha256(identity.encode("utf-8", errors="surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def content_identity(content: bytes) -> str:
    """The identity of a sample by its content."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def spread(count: int, most: int | None) -> Sequence[int]:
    """The numbers of range(count), or `most` of them, evenly spread and always the same."""
    return range(count) if most is None or count <= most else [n * count // most for n in range(most)]


class Share(NamedTuple):
    """The records that are in val, or all others."""

    val: float
    """The share that is in val."""
    is_val: bool

    def has(self, identity: str) -> bool:
        """Whether a record belongs to it."""
        return in_share(identity, self.val) == self.is_val

    def among(self, identities: Sequence[str], name: str) -> np.ndarray:
        """bool [records]: which ones belong to it. Raises ConfigError, for the dataset `name`, if all or none do."""
        chosen = np.array([self.has(identity) for identity in identities], dtype=bool)
        if chosen.all() or not chosen.any():
            none_or_all = "all" if chosen.all() == self.is_val else "none"
            raise ConfigError(
                f"datasets.{name}.build_info.val={self.val}: {none_or_all} of {len(chosen)} records would be in val. "
                "Change the share."
            )
        return chosen
