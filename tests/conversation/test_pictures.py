"""Opening picture files, hostile ones included."""

import io
import os
from pathlib import Path

import pytest
from helpers import GOLDEN
from PIL import Image

from minigpt4.conversation import PictureError, open_media, open_picture
from minigpt4.conversation.pictures import FORMATS, OWN_FORMATS


def save(path, mode="RGB", size=(30, 20), **options):
    Image.effect_noise(size, 60).convert(mode).save(path, **options)
    return path


@pytest.mark.parametrize("format", OWN_FORMATS)
def test_formats(tmp_path, format):
    picture = open_picture(save(tmp_path / f"picture.{format.lower()}"))
    assert (picture.mode, picture.size) == ("RGB", (30, 20))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "I;16"])
def test_modes(tmp_path, mode):
    picture = Image.new(mode, (9, 7))
    picture.save(tmp_path / "picture.png")
    assert open_picture(tmp_path / "picture.png").mode == "RGB"


def test_rotated_pictures_become_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert open_picture(save(tmp_path / "phone.jpg", exif=exif)).size == (20, 30)


def test_the_first_frame_of_an_animation_is_read(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_picture(tmp_path / "a.gif").getpixel((3, 3)) == (255, 0, 0)


def test_open_files(tmp_path):
    content = (GOLDEN / "images" / "rgb.png").read_bytes()
    assert open_picture(io.BytesIO(content), "rgb.png").size == open_picture(GOLDEN / "images" / "rgb.png").size
    with pytest.raises(PictureError, match="^shard/3.jpg is not a picture"):
        open_picture(io.BytesIO(b"x"), "shard/3.jpg")


def test_too_many_pixels(tmp_path):
    path = save(tmp_path / "large.png", size=(200, 100))
    with pytest.raises(PictureError, match="large.png .*200 × 100.* 0.01 million"):
        open_picture(path, max_pixels=10_000)


@pytest.mark.parametrize("format", OWN_FORMATS)
@pytest.mark.parametrize("keep", [0, 10, 40, 200, 0.5, 0.9])
def test_damaged_files_raise_nothing_else(tmp_path, format, keep):
    path = save(tmp_path / f"picture.{format.lower()}", size=(64, 64))
    content = path.read_bytes()
    for cut in (content[: keep if isinstance(keep, int) else int(keep * len(content))], b"\xff" * 20 + content[20:]):
        path.write_bytes(cut)
        try:
            open_picture(path)
        except PictureError as error:
            assert path.name in str(error)
            assert str(tmp_path) not in str(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipes_and_devices(tmp_path):
    """Opening or reading these would wait for ever."""
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "pipe.mp4", "link.png"):
        with pytest.raises(PictureError, match=f"^{name} cannot be read: it is a pipe or a device"):
            open_media(tmp_path / name)


def test_urls_and_contents():
    content = (GOLDEN / "images" / "rgb.png").read_bytes()
    assert open_picture(content).tobytes() == open_picture(GOLDEN / "images" / "rgb.png").tobytes()
    with pytest.raises(PictureError, match="^The picture is not a picture"):
        open_picture(b"x")
    for url in ("https://example.com/cat.png", "data:image/png;base64,AAAA", "file:///cat.png"):
        for path in (url, Path(url)):  # the commands make a Path of what they are given
            with pytest.raises(PictureError, match="is a URL, not a file. Download it"):
                open_picture(path)


def test_heic(tmp_path):
    """Where pillow-heif is not installed, the error names it."""
    heic = tmp_path / "phone.heic"
    heic.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.raises(PictureError, match=r"^phone\.heic .*(HEIC|damaged)"):
        open_picture(heic)
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.new("RGB", (64, 48), (200, 30, 40))).save(heic)
    picture = open_picture(heic)
    assert picture.size == (64, 48)
    assert all(abs(a - b) < 6 for a, b in zip(picture.getpixel((9, 9)), (200, 30, 40), strict=True))


def test_formats_for_strangers(tmp_path):
    path = save(tmp_path / "picture.png", format="TIFF")
    with pytest.raises(PictureError, match=r"picture.png is not a picture that can be read. Accepted: .*AVIF, HEIC"):
        open_media(path, formats=FORMATS)


def test_other_files(tmp_path):
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    for path in (tmp_path / "eps.png", tmp_path / "absent.png", tmp_path):
        with pytest.raises(PictureError, match=path.name):
            open_picture(path)
