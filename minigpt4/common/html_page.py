"""The pages that commands write. Each is one file, which needs no other and no network."""

import base64
import html
import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

SIDE = 160
"""Pixels of a picture at most, in width and height."""


def html_page(title: str, body: str, style: str = "") -> str:
    """A page. style: CSS beside that of all pages."""
    common = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{common}{style}</style></head>\n<body>{body}</body></html>\n"
    )


def small_jpeg(image: "Image.Image") -> bytes:
    """A picture of any size and mode as a JPEG of at most SIDE pixels a side, on white if it is transparent."""
    from minigpt4.common.rgb import WHITE, to_rgb

    image.draft(None, (SIDE, SIDE))  # a large JPEG need not be decoded in full
    small = to_rgb(image, WHITE).copy()
    small.thumbnail((SIDE, SIDE))
    small.save(file := io.BytesIO(), "JPEG", quality=80)
    return file.getvalue()


def img(jpeg: bytes) -> str:
    """The element of a picture, with its file in it."""
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'
