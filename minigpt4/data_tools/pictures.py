"""What can be said about a picture without the model: its size, sharpness and contrast, and copies of it."""

import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from minigpt4.common.rgb import open_image, to_rgb
from minigpt4.datasets.conversations.text_files import optional

# Pictures are measured with their shorter side at about this many pixels; the model sees 224.
SIDE = 160
# Variance of the Laplacian below which a picture is blurred: about the blur of a Gaussian of 2 pixels at SIDE.
BLURRED = 20.0
# Standard deviation of the grey values (0 to 255) below which a picture shows one colour.
FLAT = 2.0
# Copies differ in at most so many of HASH_BITS, and by so many of 255 levels in each of 4 x 4 fields.
HASH_BITS, HASH_DISTANCE, COLOUR_DISTANCE = 256, 16, 16
# Each picture is compared with this many neighbours in each of 16 orders.
NEIGHBOURS = 16


class Look(NamedTuple):
    """What was seen in a picture."""

    width: int
    height: int
    sharpness: float
    """Variance of the Laplacian."""
    contrast: float
    """Standard deviation of the grey values."""
    signature: bytes
    """A perceptual hash of HASH_BITS, and 4 x 4 colours."""


def opencv() -> Any:
    """cv2, with one thread. Raises ConfigError if it is not installed."""
    cv2 = optional("cv2", "data", "data check")
    cv2.setNumThreads(1)
    return cv2


def look_at(content: bytes) -> Look:
    """Measure a picture file. A JPEG is decoded at a half, a quarter or an eighth of its size where that is enough.

    Raises any kind of error for a file that is no picture, or is broken: Pillow's plug-ins do.
    """
    cv2 = opencv()
    image = open_image(io.BytesIO(content))
    width, height = image.size
    image.draft(None, (SIDE, SIDE))
    pixels = np.asarray(to_rgb(image))
    grey = cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)
    scale = SIDE / min(grey.shape)
    if scale < 1:
        size = [max(1, round(scale * side)) for side in (grey.shape[1], grey.shape[0])]
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    small = cv2.resize(grey, (64, 64), interpolation=cv2.INTER_AREA)
    frequencies = cv2.dct(small.astype(np.float32))[:16, :16]
    bits = np.packbits(frequencies > np.median(frequencies))
    colours = cv2.resize(pixels, (4, 4), interpolation=cv2.INTER_AREA)
    sharpness = float(cv2.Laplacian(grey, cv2.CV_32F).var())
    return Look(width, height, sharpness, float(grey.std()), bits.tobytes() + colours.tobytes())


def find_copies(signatures: list[bytes]) -> Iterator[tuple[int, int, int]]:
    """(picture, an earlier one like it, number of bits that differ) for each picture that has one.

    The hashes are sorted 16 times, each time from another place in them on. Near ones come next to each other in at
    least one of these orders, unless very many pictures look nearly alike.
    """
    count = len(signatures)
    table = np.frombuffer(b"".join(signatures), dtype=np.uint8).reshape(count, -1)
    hashes, colours = table[:, : HASH_BITS // 8], table[:, HASH_BITS // 8 :].astype(np.int16)
    nearest = np.full(count, HASH_DISTANCE + 1)
    like = np.arange(count)
    for turn in range(0, HASH_BITS // 8, 2):
        rotated = np.ascontiguousarray(np.roll(hashes, -turn, axis=1))
        order = np.argsort(rotated.view(f"V{HASH_BITS // 8}").ravel(), kind="stable")
        for step in range(1, min(NEIGHBOURS, count - 1) + 1):
            pairs = np.sort(np.stack([order[:-step], order[step:]]), axis=0)
            distance = np.bitwise_count(hashes[pairs[0]] ^ hashes[pairs[1]]).sum(axis=1, dtype=np.int64)
            pairs, distance = pairs[:, distance <= HASH_DISTANCE], distance[distance <= HASH_DISTANCE]
            alike = np.abs(colours[pairs[0]] - colours[pairs[1]]).max(axis=1, initial=0) <= COLOUR_DISTANCE
            for first, second, bits in zip(*pairs[:, alike], distance[alike], strict=True):
                if bits < nearest[second] or bits == nearest[second] and first < like[second]:
                    nearest[second], like[second] = bits, first
    for picture in np.flatnonzero(like < np.arange(count)):
        yield int(picture), int(like[picture]), int(nearest[picture])
