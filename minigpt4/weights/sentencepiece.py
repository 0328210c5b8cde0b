"""Writes SentencePiece's model file without protobuf: a list of pieces, and the settings of trainer and normalizer.

Field numbers are from sentencepiece_model.proto.
"""

import struct
from collections.abc import Iterable

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
BPE = 2


def piece(text: str, score: float = 0.0, kind: int = NORMAL) -> bytes:
    """A piece, encoded. Appended to a model file, it is added to the list of pieces."""
    content = _bytes(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind)
    return _bytes(1, content)


def bpe_model(pieces: Iterable[tuple[str, float, int]], add_dummy_prefix: bool = True) -> bytes:
    """A model like LLaMA's, from (text, score, kind) of each piece in the order of the ids.

    If there are pieces for all 256 bytes, they spell text that has no piece of its own.
    """
    pieces = list(pieces)
    trainer = _number(3, BPE) + _number(35, sum(kind == BYTE for _, _, kind in pieces) == 256)
    normalizer = _bytes(1, b"identity") + _number(3, add_dummy_prefix) + _number(4, False)
    return b"".join(piece(*p) for p in pieces) + _bytes(2, trainer) + _bytes(3, normalizer)


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _varint(value: int) -> bytes:
    value, low = value >> 7, value & 0x7F
    return bytes([low]) if not value else bytes([low | 0x80]) + _varint(value)
