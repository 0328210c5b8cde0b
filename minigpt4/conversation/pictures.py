"""Pictures from strangers: opened with care, or refused with a reason that a visitor understands."""

from pathlib import Path
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64_000_000


class PictureError(ValueError):
    """A file that is no usable picture or video; the message says why, and names the file but not its folder."""


def open_picture(source: str | Path | BinaryIO, name: str | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a picture file, upright, in RGB; of an animation, the first frame.

    Args:
        source: a path, or an open binary file, whose `name` is for messages.

    Raises:
        PictureError: no picture, another format, damaged, or more than `max_pixels` (read from its header, so a
            decompression bomb is never unpacked).
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
