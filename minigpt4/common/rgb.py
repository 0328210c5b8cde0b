"""Opening picture files, and turning any decoded picture into RGB. Training, chat and the commands all do it here.

Pictures come from anywhere: a few kB can unpack to gigabytes. So the size in the header is compared with a bound before
anything is decompressed, and what a PNG holds beside its pixels cannot make it unreadable.
"""

import io
import warnings
from contextlib import suppress
from functools import cache
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin

MAX_PIXELS = 64_000_000
# A JPEG with more pixels than the bound, but at most this many times as many, is decoded at half its width and height.
REDUCIBLE = 4
# Formats that Pillow unpacks before their size is known, or gives to another program.
UNBOUNDED = {"ICO", "ICNS", "EPS", "WMF"}
WHITE = (255, 255, 255)
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The chunks of a PNG that decide how it looks. The others hold texts, profiles, times …
PNG_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def open_image(file: BinaryIO, formats: tuple[str, ...] | None = None, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open a picture file. The pixels of a PNG are decoded at once, those of other formats when they are first used.

    Args:
        formats: names of Pillow's that are accepted, and of pillow-heif, "HEIF"; None: all that are installed but
            UNBOUNDED.
        max_pixels: limit of width × height. A JPEG beyond it is opened at half its width and height, if this is enough.

    Raises Image.DecompressionBombError for too many pixels, whose text follows the name of the file. A file that is no
    picture, or is broken, may raise any kind of error: Pillow's plug-ins do.
    """
    head = file.read(12)
    file.seek(0)
    max_pixels = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)  # Pillow's, if someone has set it lower
    formats = _installed(formats, read_heif=head[4:8] == b"ftyp")  # which begins HEIC and AVIF
    try:
        return _open_bounded(file, formats, max_pixels)
    except Image.DecompressionBombError:
        raise
    except Exception:  # Pillow refuses a PNG for a text of more than 1 MB, unpacked, and for a damaged note
        file.seek(0)
        if file.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
            raise
        return _open_bounded(io.BytesIO(_pixels_alone(file.read())), formats, max_pixels)


def to_rgb(image: Image.Image, background: tuple[int, int, int] | None = None) -> Image.Image:
    """The decoded picture with three channels of 8 bits. Values of more bits are scaled (`to_8_bits`).

    background: the colour behind a transparent picture; None: transparency is dropped, not blended, so that whatever
    colour is stored in a transparent pixel shows.
    """
    image.load()
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _from_many_bits(image)
    if background and image.has_transparency_data:
        below = Image.new("RGBA", image.size, background)
        return Image.alpha_composite(below, _to_rgba(image)).convert("RGB")
    if image.mode == "RGB":
        return image  # `convert` would copy it
    if image.mode == "LAB":
        from PIL import ImageCms

        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB")
    if image.mode in ("La", "RGBa") or image.mode == "P" and "transparency" in image.info:
        image = _to_rgba(image)  # of "P", the same colours as without it, but no warning of Pillow's for each file
    return image.convert("RGB")


def to_8_bits(values: np.ndarray) -> np.ndarray:
    """Numbers of any type as uint8 of the same shape. NaN becomes black.

    The range of the whole array decides: values from 0 to 1 (floats only), 0 to 255 or 0 to 65535 (integers only) are
    scaled from there; floats may exceed these by a tenth, as resizing makes them do. All others, and those that use
    less than a sixteenth of the larger range (but not uint16), are scaled from their own, which begins at 0 if none is
    negative.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values * np.uint8(255)
    is_float = values.dtype.kind == "f"
    finite = values[np.isfinite(values)] if is_float else values
    least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    slack = 0.1 if is_float else 0.0
    low, high = min(least, 0.0), max(most, 0.0) or 1.0
    ranges = [1, 255] if is_float else [255, 65535]
    full = next((full for full in ranges if most <= full + slack * full), 0)
    # A dark picture of 16 bits stays dark. In other types, values far below a range have another unit, such as metres.
    if full == ranges[1] and values.dtype != np.uint16 and most < full / 16:
        full = 0
    if full and least >= -slack * most:
        low, high = 0.0, float(full)
    scaled = values.astype(np.float32)
    np.nan_to_num(scaled, copy=False, nan=low, posinf=high, neginf=low)
    scaled -= low
    scaled *= 255 / (high - low)
    return np.clip(scaled, 0, 255, out=scaled).round().astype(np.uint8)


def from_array(array: np.ndarray) -> Image.Image:
    """The picture of an array [H,W], [H,W,1], [H,W,3] (RGB) or [H,W,4] (RGBA) of any number type.

    Raises ValueError for another shape, or values that are no numbers.
    """
    array = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    is_picture = array.ndim == 2 or array.ndim == 3 and array.shape[2] in (3, 4)
    if not is_picture or not array.size or array.dtype.kind not in "buif":
        raise ValueError(
            f"An array of shape {list(array.shape)} and type {array.dtype} is no picture. Expected: numbers of shape "
            "[H,W], [H,W,3] (RGB) or [H,W,4] (RGBA)."
        )
    return Image.fromarray(np.ascontiguousarray(to_8_bits(array)))


def _open_bounded(file: BinaryIO, formats: tuple[str, ...], max_pixels: int) -> Image.Image:
    try:
        image = Image.open(file, formats=formats)
    except Image.DecompressionBombError:  # Pillow's own bound, before we know the format
        file.seek(0)
        try:
            image = JpegImagePlugin.jpeg_factory(file)
        except SyntaxError:
            raise _too_large(max_pixels) from None
    pixels = image.width * image.height
    # A progressive JPEG is held in memory as a whole, at any size.
    reducible = image.format in ("JPEG", "MPO") and not image.info.get("progressive")
    if pixels > max_pixels * (REDUCIBLE if reducible else 1):
        raise _too_large(max_pixels, image)
    if pixels > max_pixels:
        image.draft(None, (image.width // 2, image.height // 2))
    if image.format == "PNG":
        _scale_key(image)
        image.load()  # here, because texts may come after the pixels
    return image


def _scale_key(image: Image.Image) -> None:
    """Scale the colour of a PNG that means transparent to 8 bits. Pillow scales the pixels only."""
    key, raw_mode = image.info.get("transparency"), image.tile[0].args
    if isinstance(key, int) and raw_mode in ("L;2", "L;4"):
        image.info["transparency"] = key * {"L;2": 85, "L;4": 17}[raw_mode]
    elif isinstance(key, tuple) and raw_mode == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in key)


def _too_large(max_pixels: int, image: Image.Image | None = None) -> Image.DecompressionBombError:
    size = f"is {image.width} × {image.height}" if image else "unpacks to too many"
    return Image.DecompressionBombError(
        f"{size} pixels; at most {max_pixels / 1e6:g} million are accepted. Make it smaller first."
    )


def _from_many_bits(image: Image.Image) -> Image.Image:
    """A picture of one channel with more than 8 bits as "L", or as "LA" if one of its values means transparent."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})
    if image.mode == "I" and tags.get(258) == (32,) and tags.get(339, (1,)) == (1,):  # a TIFF of unsigned numbers
        values = values.view(np.uint32)
    if tags.get(258) == (12,):
        values = values << 4
    gray = Image.fromarray(to_8_bits(values))
    if tags.get(262) == 0:  # a TIFF in which 0 is white; Pillow turns 8 bits round itself
        gray = ImageOps.invert(gray)
    key = image.info.get("transparency")
    if isinstance(key, int):
        gray.putalpha(Image.fromarray(to_8_bits(values != key)))
    return gray


def _to_rgba(image: Image.Image) -> Image.Image:
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _pixels_alone(chunks: bytes) -> bytes:
    """A PNG file with none but PNG_CHUNKS. chunks: the content of a PNG file after its signature."""
    kept, place = [PNG_SIGNATURE], 0
    while place < len(chunks):  # a chunk: its length, its kind, its data, a checksum
        end = place + 12 + int.from_bytes(chunks[place : place + 4])
        if chunks[place + 4 : place + 8] in PNG_CHUNKS:
            kept.append(chunks[place:end])
        place = end
    return b"".join(kept)


@cache
def _installed(formats: tuple[str, ...] | None, read_heif: bool) -> tuple[str, ...]:
    """The formats that can be read, in the order in which Pillow tries them. None: all but UNBOUNDED.

    read_heif: let Pillow read HEIC, if pillow-heif is installed. It reads AVIF itself.
    """
    # Of a picture beyond Pillow's own bound, which is larger than ours.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    Image.init()
    if read_heif:
        with suppress(ImportError):
            import pillow_heif

            pillow_heif.register_heif_opener()
    return tuple(name for name in Image.ID if (name in formats if formats else name not in UNBOUNDED))
