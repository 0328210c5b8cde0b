"""Opening untrusted picture files: each is decoded safely, or refused with a reason that a user understands."""

import importlib.util
import io
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from minigpt4.common.files import open_regular
from minigpt4.common.rgb import MAX_PIXELS, WHITE, from_array, open_image, to_rgb

# Names of Pillow's. HEIC is accepted in addition if pillow-heif is installed.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
OWN_FORMATS = (*FORMATS, "TIFF")  # a container of many codecs, so not for the files of others
HEIF = "HEIF"


class PictureError(ValueError):
    """A file is not a usable picture or video. The message gives the reason and the file's name without its folder.

    Args:
        kind: the reason in one word, by which the web page chooses a text in the visitor's language (`texts.json`).
        values: of that text, beside the file's name.
    """

    def __init__(self, message: str, kind: str = "damaged", **values: str | float):
        super().__init__(message)
        self.kind, self.values = kind, values


def open_picture(
    source: str | Path | bytes | BinaryIO,
    name: str | None = None,
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] = OWN_FORMATS,
) -> Image.Image:
    """Open a picture file in RGB, rotated upright, on white if it is transparent. Of an animation, only the first frame
    is read.

    Args:
        source: a path, the content of a file, or an open binary file.
        name: the file's name in error messages; by default that of `source`.
        max_pixels: limit of width × height, before anything is decompressed (`common.rgb.open_image`).
        formats: FORMATS for the files of others.

    Raises:
        PictureError: the file is not a picture, has another format, is damaged, or has too many pixels.
    """
    if isinstance(source, bytes | bytearray):
        source = io.BytesIO(source)
    is_path = isinstance(source, str | Path)
    name = name or (name_of(source) if is_path else getattr(source, "name", None)) or "The picture"
    try:
        if not is_path:
            return _read(source, max_pixels, formats)
        with open_regular(source) as file:
            return _read(file, max_pixels, formats)
    except UnidentifiedImageError:
        message = f"{name} is not a picture that can be read. Accepted: {accepted(formats)}."
        raise PictureError(message, "not_picture", formats=accepted(formats)) from None
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name} {error}", "large_picture", most=max_pixels / 1e6) from None
    except OSError as error:
        raise PictureError(f"{name} cannot be read: {error.strerror or 'it is damaged or cut short'}.") from None
    except Exception as error:  # Pillow's decoders raise SyntaxError, ValueError, struct.error … on damaged files
        raise PictureError(f"{name} is damaged: {error}") from None


def to_picture(image: str | Path | bytes | BinaryIO | Image.Image | np.ndarray) -> Image.Image:
    """A picture in RGB, on white if it is transparent, of a file, its content, a PIL image, or an array [H,W],
    [H,W,3] (RGB) or [H,W,4] (RGBA).

    Raises PictureError for a picture that cannot be used, and for anything else.
    """
    try:
        if isinstance(image, np.ndarray):
            image = from_array(image)
        if isinstance(image, Image.Image):
            return to_rgb(image, WHITE)
    except (ValueError, OSError, SyntaxError) as error:  # of a file that Pillow has not read yet, and cannot
        raise PictureError(str(error)) from None
    if isinstance(image, str | Path | bytes | bytearray) or hasattr(image, "read"):
        return open_picture(image)
    raise PictureError(
        f"A {type(image).__name__} is no picture. Expected: a path, the bytes of a file, a PIL image, a NumPy array "
        "[H,W,3], or a processed tensor [3,H,W]."
    )


def name_of(path: str | Path) -> str:
    """The name of a file in messages, without its folder. Raises PictureError for a URL."""
    if str(path).startswith(("http:/", "https:/", "ftp:/", "file:/", "data:")):  # a Path has only one slash
        raise PictureError(f"{str(path)[:100]} is a URL, not a file. Download it, and give the path of the file.")
    return Path(path).name


def accepted(formats: tuple[str, ...]) -> str:
    """The formats and HEIC, for messages."""
    heif = "HEIC" if importlib.util.find_spec("pillow_heif") else "HEIC (`pip install pillow-heif`)"
    return ", ".join([*formats, heif])


def _read(file: BinaryIO, max_pixels: int, formats: tuple[str, ...]) -> Image.Image:
    image = open_image(file, (*formats, HEIF), max_pixels)
    with suppress(Exception):  # a damaged note on how to turn it; damaged pixels raise again below
        ImageOps.exif_transpose(image, in_place=True)
    return to_rgb(image, WHITE)
