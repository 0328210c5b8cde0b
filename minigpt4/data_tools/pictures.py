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
# Copies differ in at most so many of the 64 bits of their hashes, and by so many of 255 levels in each field.
HASH_DISTANCE, FIELD_DISTANCE = 8, 24
# Each picture is compared with this many neighbours in each of TURNS orders.
NEIGHBOURS, TURNS = 16, 16
SIGNATURE = np.dtype([("hash", "u8"), ("fields", "u1", 16 * 16 + 4 * 4 * 3)])


class Look(NamedTuple):
    """What was seen in a picture."""

    width: int
    height: int
    sharpness: float
    """Variance of the Laplacian."""
    contrast: float
    """Standard deviation of the grey values."""
    signature: bytes
    """As SIGNATURE: a perceptual hash, and 16 x 16 grey and 4 x 4 coloured fields."""


def opencv() -> Any:
    """cv2, with one thread. Raises ConfigError if it is not installed."""
    cv2 = optional("cv2", "opencv-python-headless", "data check")
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
    shrunk = [
        cv2.resize(*pair, interpolation=cv2.INTER_AREA)
        for pair in ((grey, (32, 32)), (grey, (16, 16)), (pixels, (4, 4)))
    ]
    frequencies = cv2.dct(shrunk[0].astype(np.float32))[:8, :8].ravel()
    frequencies[0] = 0  # the brightness
    hash = np.packbits(frequencies > np.median(frequencies)).tobytes()
    signature = hash + shrunk[1].tobytes() + shrunk[2].tobytes()
    return Look(width, height, float(cv2.Laplacian(grey, cv2.CV_32F).var()), float(grey.std()), signature)


def find_copies(signatures: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(picture, an earlier one like it, number of bits that differ) for each picture that has one.

    signatures: of type SIGNATURE. The hashes are sorted TURNS times, each time from another bit on. Near ones come next
    to each other in at least one of these orders, unless very many pictures look nearly alike.
    """
    count, hashes, fields = len(signatures), signatures["hash"], signatures["fields"]
    nearest = np.full(count, HASH_DISTANCE + 1)
    like = np.arange(count)
    for turn in range(0, 64, 64 // TURNS):
        rotated = hashes if not turn else (hashes << np.uint64(turn)) | (hashes >> np.uint64(64 - turn))
        order = np.argsort(rotated, kind="stable")
        for step in range(1, min(NEIGHBOURS, count - 1) + 1):
            pairs = np.sort(np.stack([order[:-step], order[step:]]), axis=0)
            distance = np.bitwise_count(hashes[pairs[0]] ^ hashes[pairs[1]])
            for first, second in pairs[:, distance <= HASH_DISTANCE].T:
                bits = int(hashes[first] ^ hashes[second]).bit_count()
                better = bits < nearest[second] or bits == nearest[second] and first < like[second]
                if better and np.abs(fields[first].astype(int) - fields[second]).max() <= FIELD_DISTANCE:
                    nearest[second], like[second] = bits, first
    for picture in np.flatnonzero(like < np.arange(count)):
        yield int(picture), int(like[picture]), int(nearest[picture])
