"""Opening untrusted picture files: each is decoded safely, or refused with a reason that a user understands."""

from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64_000_000


class PictureError(ValueError):
    """A file is not a usable picture or video. The message gives the reason and the file's name without its folder."""


def open_picture(source: str | Path | BinaryIO, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a picture file in RGB, rotated upright. Of an animation, only the first frame is read.

    Args:
        source: a path or an open binary file.
        name: the file's name in error messages; by default that of `source`.
        max_pixels: limit of width × height. It is compared with the header, before anything is decompressed.

    Raises:
        PictureError: the file is not a picture, has another format, is damaged, or has too many pixels.
    """
    name = name or Path(source).name
    try:
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise PictureError(
                    f"{name} is {image.width} × {image.height} pixels; at most {max_pixels / 1e6:g} million are "
                    "accepted. Make it smaller first."
                )
            image.seek(0)
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise PictureError(f"{name} is not a picture that can be read. Accepted: {', '.join(FORMATS)}.") from None
    except Image.DecompressionBombError:
        raise PictureError(f"{name} unpacks to too many pixels. Make it smaller first.") from None
    except PictureError:
        raise
    except OSError as error:
        raise PictureError(f"{name} cannot be read: {error.strerror or 'it is damaged or cut short'}.") from None
    except Exception as error:  # Pillow's decoders raise SyntaxError, ValueError, struct.error … on damaged files
        raise PictureError(f"{name} is damaged: {error}") from None
