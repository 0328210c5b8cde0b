"""Any picture file becomes RGB of 8 bits, by one function for training and chat; bounds on what is decompressed."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from minigpt4.common import rgb
from minigpt4.common.rgb import open_image, to_rgb
from minigpt4.conversation import PictureError, open_picture
from minigpt4.processors import Blip2ImageTrainProcessor, read_picture

RAMP = np.tile(np.arange(256, dtype=np.uint8), (4, 1))


def file_of(image: Image.Image, format: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()


def trained(content: bytes) -> np.ndarray:
    """The picture as a training run decodes it, [H,W,3]."""
    return read_picture(content, Blip2ImageTrainProcessor()).permute(1, 2, 0).numpy()


def chatted(content: bytes) -> np.ndarray:
    return np.asarray(open_picture(content))


def tiff_of(values: np.ndarray) -> bytes:
    return file_of(Image.fromarray(values), "TIFF")


def unsigned_tiff() -> bytes:
    """A TIFF of unsigned numbers of 32 bits, which Pillow takes for signed ones."""
    content = tiff_of((RAMP.astype(np.uint32) << 24).view(np.int32))
    assert content.count(struct.pack("<HHII", 339, 3, 1, 2)) == 1  # the tag SampleFormat: signed
    return content.replace(struct.pack("<HHII", 339, 3, 1, 2), struct.pack("<HHII", 339, 3, 1, 1))


MANY_BITS = {
    "PNG of 16 bits": file_of(Image.fromarray(RAMP.astype(np.uint16) * 257), "PNG"),
    "TIFF of 16 bits": tiff_of(RAMP.astype(np.uint16) * 257),
    "8 bits in 32": tiff_of(RAMP.astype(np.int32)),
    "16 bits in 32": tiff_of(RAMP.astype(np.int32) * 257),
    "31 bits": tiff_of(RAMP.astype(np.int32) << 23),
    "32 bits, unsigned": unsigned_tiff(),
    "floats to 1": tiff_of(RAMP.astype(np.float32) / 255),
    "floats to 255": tiff_of(RAMP.astype(np.float32)),
    "large floats": tiff_of(RAMP.astype(np.float32) * 1000),
    "floats from -1 to 1": tiff_of(RAMP.astype(np.float32) / 127.5 - 1),
}


@pytest.mark.parametrize("read", [trained, chatted])
@pytest.mark.parametrize("kind", MANY_BITS)
def test_many_bits_are_scaled_to_8(kind, read):
    assert np.abs(read(MANY_BITS[kind]).astype(int) - RAMP[:, :, None]).max() <= 1


def test_a_dark_picture_of_16_bits_stays_dark():
    assert chatted(tiff_of(RAMP.astype(np.uint16) * 64)).max() == 64


def test_floats_that_are_no_numbers_or_overshoot():
    values = np.array([[np.nan, np.inf, -np.inf, 0.5, 1.05, -0.05]], np.float32)
    assert rgb.to_8_bits(values).tolist() == [[0, 255, 0, 128, 255, 0]]
    assert rgb.to_8_bits(np.full((2, 2), np.nan)).tolist() == [[0, 0], [0, 0]]
    assert rgb.to_8_bits(np.full((2, 2), -7)).tolist() == [[0, 0], [0, 0]]


def test_a_lab_picture():
    gray = Image.merge("LAB", [Image.new("L", (2, 2), 255), Image.new("L", (2, 2), 128), Image.new("L", (2, 2), 128)])
    assert chatted(file_of(gray, "TIFF")).min() >= 254


def half_transparent() -> Image.Image:
    """Red: opaque in the upper half, half transparent in the third quarter, and invisible below."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :, 0] = 200
    pixels[:4, :, 3], pixels[4:6, :, 3] = 255, 128
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("mode", "format"),
    [("RGBA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "GIF")],
)
def test_chat_shows_transparent_pictures_on_white(mode, format):
    image = half_transparent()
    image = image.quantize(16) if mode == "P" else image.convert(mode)
    content = file_of(image, format, **({"lossless": True} if format == "WEBP" else {}))
    top, bottom = chatted(content)[1, 1], chatted(content)[7, 1]
    assert top.tolist() == ([60, 60, 60] if mode == "LA" else [200, 0, 0])
    assert bottom.tolist() == [255, 255, 255]
    if format != "GIF":  # has no half transparent pixels
        assert np.abs(chatted(content)[5, 1] - (255 + (top.astype(int) - 255) * 128 / 255)).max() <= 1
    assert trained(content)[1, 1].tolist() == top.tolist()


@pytest.mark.parametrize(
    ("mode", "colour"), [("1", 0), ("L", 7), ("RGB", (0, 0, 255)), ("I;16", 3000), ("P", 0)]
)  # fmt: skip
def test_a_colour_that_stands_for_transparent(mode, colour):
    content = file_of(Image.new(mode, (4, 4), colour), "PNG", transparency=colour)
    assert (chatted(content) == 255).all()
    assert (trained(content) == 255).mean() < 0.5  # its own colour, as in the first release


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_alpha(mode):
    image = half_transparent().convert("LA" if mode == "La" else "RGBA").convert(mode)
    assert to_rgb(image, rgb.WHITE).getpixel((1, 7)) == (255, 255, 255)
    assert to_rgb(image).getpixel((1, 1)) == ((60, 60, 60) if mode == "La" else (200, 0, 0))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"gAMA", b"pHYs", b"sRGB", b"cHRM", b"eXIf", b"acTL"])
def test_damaged_notes_leave_a_png_readable(kind):
    content = file_of(Image.fromarray(RAMP), "PNG")
    for place in (33, len(content) - 12):  # before and after the pixels
        noted = content[:place] + chunk(kind, b"a\0\x07") + content[place:]
        for read in (trained, chatted):
            assert np.array_equal(read(noted)[0, :, 0], RAMP[0])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_damaged_exif_leaves_a_picture_readable(format):
    content = file_of(Image.new("RGB", (9, 5), (90, 90, 90)), format, exif=b"Exif\0\0this is no TIFF")
    assert chatted(content)[2, 2].tolist() == [90, 90, 90]


def png(depth: int, kind: int, width: int, row: bytes, *chunks: bytes, height: int = 1) -> bytes:
    """A PNG whose rows are all the same. kind: 0 is gray, 2 is RGB."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + row) * height))
    return b"".join([rgb.PNG_SIGNATURE, header, *chunks, pixels, chunk(b"IEND", b"")])


@pytest.mark.parametrize(
    ("depth", "kind", "row", "key", "second"),
    [
        (2, 0, b"\x60", (1,), 170),
        (4, 0, b"\x12", (1,), 34),
        (16, 0, struct.pack(">2H", 3000, 34 * 257), (3000,), 34),
        (16, 2, struct.pack(">6H", 1000, 2000, 3000, 40 * 257, 40 * 257, 40 * 257), (1000, 2000, 3000), 40),
    ],
)
def test_a_transparent_colour_has_the_depth_of_the_png(depth, kind, row, key, second):
    content = png(depth, kind, 2, row, chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)))
    assert chatted(content)[0].tolist() == [[255] * 3, [second] * 3]


def png_with_text(kind: str) -> bytes:
    image, text, info = Image.fromarray(RAMP), "x" * 3_000_000, PngImagePlugin.PngInfo()
    if kind == "zTXt":
        info.add_text("note", text, zip=True)
    elif kind == "iTXt":
        info.add_itxt("note", text, zip=True)
    elif kind == "many":
        for _ in range(70):
            info.add_text("note", text[: 2**20 - 1], zip=True)
    elif kind == "after the pixels":
        content = file_of(image, "PNG")
        return content[:-12] + chunk(b"zTXt", b"note\0\0" + zlib.compress(text.encode())) + content[-12:]
    profile = {"icc_profile": text.encode()} if kind == "iCCP" else {}
    return file_of(image, "PNG", pnginfo=info, **profile)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "many", "after the pixels"])
def test_long_texts_of_a_png_are_passed_over(kind):
    content = png_with_text(kind)
    for read in (trained, chatted):
        assert np.array_equal(read(content), np.repeat(RAMP[:, :, None], 3, axis=2))
    with pytest.raises(PictureError, match="The picture "):
        open_picture(content[:50])  # without any pixel


def test_pixels_are_bounded_in_training_and_chat(monkeypatch):
    """A small file that would unpack to 300 MB."""
    content = png(8, 2, 10_000, bytes(30_000), height=10_000)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decompressed"))
    with pytest.raises(Image.DecompressionBombError, match="is 10000 × 10000 pixels; at most 64 million"):
        trained(content)
    with pytest.raises(PictureError, match="^bomb.png is 10000 × 10000 pixels; at most 64 million"):
        open_picture(content, "bomb.png")


def test_a_jpeg_beyond_the_bound_is_decoded_at_half_its_size(monkeypatch):
    """Also one beyond Pillow's own bound, which counts if it is lower than ours."""
    image = Image.linear_gradient("L").resize((300, 200)).convert("RGB")
    content = file_of(image, "JPEG", quality=95)
    halved = np.asarray(image.resize((150, 100)))
    for bound in (15_000, 59_000):
        decoded = np.asarray(to_rgb(open_image(io.BytesIO(content), max_pixels=bound)))
        assert decoded.shape == halved.shape and np.abs(decoded.astype(int) - halved).max() <= 3
    assert open_image(io.BytesIO(content), max_pixels=60_000).size == (300, 200)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    assert trained(content).shape == (100, 150, 3)
    for large in (file_of(image.resize((600, 400)), "JPEG"), file_of(image, "JPEG", progressive=True)):
        with pytest.raises(Image.DecompressionBombError, match="at most 0.02 million"):
            trained(large)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 500, 1000]], np.int32), [0, 128, 255]),
        (np.array([[0, 5, 10]], np.float32), [0, 128, 255]),
        (np.array([[0, 0.6, 1.2]], np.float32), [0, 127, 255]),
        (np.array([[0, 128, 256]], np.uint16), [0, 0, 1]),  # a dark picture
        (np.zeros((1, 3), np.float32), [0, 0, 0]),
    ],
)
def test_ranges_between_the_usual_ones(values, expected):
    assert rgb.to_8_bits(values).tolist() == [expected]


def test_a_tiff_in_which_zero_is_white(tmp_path):
    ramp = Image.fromarray(np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4))
    ramp.save(tmp_path / "white.tif", tiffinfo={262: 0})
    with open(tmp_path / "white.tif", "rb") as file:
        shown = np.asarray(rgb.to_rgb(rgb.open_image(file)))
    assert shown[0, 0, 0] == 255 and shown[3, 3, 0] < 20


@pytest.mark.parametrize("format", ["ICO", "ICNS", "EPS"])
def test_formats_that_cannot_be_bounded_are_not_read_in_training(format):
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, format)
    file.seek(0)
    with pytest.raises(UnidentifiedImageError):
        rgb.open_image(file)
