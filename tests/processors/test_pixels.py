"""Pictures as uint8, normalised later: the crop of the float form and, within a stated rounding, its values."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from minigpt4.benchmarks.synthetic import photograph
from minigpt4.common.registry import registry
from minigpt4.processors import (
    Blip2ImageEvalProcessor,
    Blip2ImageTrainProcessor,
    normalise,
    pixels,
    read_picture,
    to_sample,
)
from minigpt4.runners.state import to_device

NAMES = ["blip2_image_eval", "blip2_image_train"]


def make(name: str, **cfg):
    return registry.get_processor_class(name).from_config({"name": name, **cfg})


def photo(seed: int, width: int, height: int) -> Image.Image:
    return Image.open(io.BytesIO(photograph(seed, width, height)))


def file_of(image: Image.Image, format: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()


def by_pillow(content: bytes) -> torch.Tensor:
    return pil_to_tensor(Image.open(io.BytesIO(content)).convert("RGB"))


def levels(processor, image: Image.Image, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two forms of a picture in grey levels [3,S,S], their crops drawn from the same seed."""
    torch.manual_seed(seed)
    floats = processor(image) * processor.std[:, None, None] + processor.mean[:, None, None]
    torch.manual_seed(seed)
    return processor.pixels(pil_to_tensor(image)).float(), (floats * 255).round()


@pytest.mark.parametrize("size", [(256, 256), (224, 224), (640, 480), (1000, 400), (90, 130)])
@pytest.mark.parametrize("name", NAMES)
def test_photographs_equal_pillows_but_for_rounding(name, size):
    for seed in range(3):
        ours, theirs = levels(make(name), photo(seed, *size), seed)
        assert ours.shape == (3, 224, 224)
        difference = (ours - theirs).abs()
        assert difference.max() <= 2 and difference.mean() < 0.01


@pytest.mark.parametrize("name", NAMES)
def test_the_hardest_picture_is_within_two_levels(name):
    """Noise in black and white."""
    rng = np.random.default_rng(0)
    for seed, (width, height) in enumerate([(20, 31), (256, 256), (500, 80), (700, 700)]):
        noise = Image.fromarray(rng.integers(0, 2, (height, width, 3), dtype=np.uint8) * 255)
        ours, theirs = levels(make(name), noise, seed)
        assert (ours - theirs).abs().max() <= 2


def test_a_big_picture_is_antialiased():
    """Lines one pixel wide become grey; taking every fourth pixel would keep them black and white."""
    lines = np.zeros((800, 800, 3), dtype=np.uint8)
    lines[:, ::2] = 255
    inner = (
        make("blip2_image_eval", image_size=200).pixels(torch.from_numpy(lines).permute(2, 0, 1))[:, 5:-5, 5:-5].float()
    )
    assert (inner - 127.5).abs().max() < 10


PHOTO = photo(0, 90, 61)
EXIF = Image.Exif()
EXIF[0x0112] = 6  # rotated by 90 degrees, which the first release ignored
FILES = {
    "jpeg": file_of(PHOTO, "JPEG"),
    "progressive": file_of(PHOTO, "JPEG", progressive=True),
    "4:4:4": file_of(PHOTO, "JPEG", subsampling=0),
    "not YCbCr": file_of(PHOTO, "JPEG", keep_rgb=True),
    "gray": file_of(PHOTO.convert("L"), "JPEG"),
    "CMYK": file_of(PHOTO.convert("CMYK"), "JPEG"),
    "one pixel": file_of(PHOTO.resize((1, 1)), "JPEG"),
    "on its side": file_of(PHOTO, "JPEG", exif=EXIF),
    "garbage behind": file_of(PHOTO, "JPEG") + b"garbage" * 99,
    "png": file_of(PHOTO, "PNG"),
    "alpha": file_of(PHOTO.convert("RGBA"), "PNG"),
    "palette": file_of(PHOTO.convert("P"), "PNG", transparency=0),
    "16 bit": file_of(Image.new("I;16", (90, 60), 40000), "PNG"),
    "webp": file_of(PHOTO, "WEBP"),
    "gif": file_of(PHOTO, "GIF"),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_are_decoded_as_pillow_decodes_them(kind):
    decoded = read_picture(FILES[kind], make("blip2_image_train"))
    assert decoded.dtype == torch.uint8
    expected = torch.full_like(decoded, 40000 // 256) if kind == "16 bit" else by_pillow(FILES[kind])  # Pillow's: 255
    assert torch.equal(decoded, expected)
    assert make("blip2_image_train", image_size=28).pixels(decoded).shape == (3, 28, 28)


JPEG = FILES["jpeg"]
BROKEN = {
    "empty": b"",
    "text": b"<html>404</html>",
    **{f"cut at {length}": JPEG[:length] for length in (2, 100, 500, len(JPEG) // 2, len(JPEG) - 30, len(JPEG) - 2)},
    "cut png": FILES["png"][:-100],
    "no tables": JPEG.replace(b"\xff\xdb", b"\xff\xfe"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_refused_as_pillow_refuses_them(kind):
    with pytest.raises(Exception) as theirs:  # noqa: B017 - Pillow raises what it likes
        by_pillow(BROKEN[kind])
    with pytest.raises(type(theirs.value)):
        read_picture(BROKEN[kind], make("blip2_image_train"))


def test_a_jpeg_that_the_quick_decoder_cannot_read_is_left_to_pillow(monkeypatch):
    def refuse(*args):
        raise RuntimeError("decode_jpeg: torchvision not compiled with libjpeg support")

    monkeypatch.setattr(pixels, "decode_jpeg", refuse)
    assert torch.equal(read_picture(JPEG, make("blip2_image_eval")), by_pillow(JPEG))


def test_a_picture_of_too_many_pixels_is_refused_unopened(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Image.DecompressionBombError):
        read_picture(JPEG, make("blip2_image_eval"))


def test_crops_are_drawn_again_and_repeat_by_seed():
    processor, image = make("blip2_image_train"), by_pillow(JPEG)
    torch.manual_seed(1)
    first, second = processor.pixels(image), processor.pixels(image)
    torch.manual_seed(1)
    assert torch.equal(processor.pixels(image), first)
    assert not torch.equal(first, second)


def test_normalised_on_the_device_as_torchvision_does():
    """Bit for bit, with each sample's own mean and std."""
    images = [pil_to_tensor(photo(seed, 60, 60)) for seed in range(2)]
    settings = ({}, {"mean": [0.5, 0.4, 0.3]})
    processors = [make("blip2_image_eval", image_size=28, **own) for own in settings]
    samples = [{**to_sample(p, i), "text_input": "x"} for p, i in zip(processors, images, strict=True)]
    batch = default_collate(samples)
    assert batch["image"].dtype == torch.uint8
    moved = to_device(batch, torch.device("cpu"))
    assert set(moved) == {"image", "text_input"}
    for processor, sample, image in zip(processors, samples, moved["image"], strict=True):
        floats = transforms.Compose(processor.transform.transforms[1:])
        assert torch.equal(image, floats(sample["image"].permute(1, 2, 0).numpy()))


def test_batches_without_mean_and_std_pass():
    bytes_of_a_plugin = {"image": torch.ones(2, 3, dtype=torch.uint8)}
    for batch in ({"image": torch.rand(2, 3, 4, 4)}, bytes_of_a_plugin, {"text_input": []}):
        assert normalise(batch) is batch


class Inverted(Blip2ImageTrainProcessor):
    """A plug-in that overrides `__call__`, as those for LAVIS do."""

    def __call__(self, image):
        return -super().__call__(image)


class Corner(Blip2ImageEvalProcessor):
    """A plug-in with pixels of its own."""

    def pixels(self, picture):
        return torch.zeros(3, 2, 2, dtype=torch.uint8)


def test_a_subclass_is_called_unless_it_has_pixels_of_its_own():
    inverted = Inverted(image_size=28)
    picture = read_picture(JPEG, inverted)
    assert picture.mode == "RGB"
    torch.manual_seed(0)
    (value,) = to_sample(inverted, picture).values()
    torch.manual_seed(0)
    assert torch.equal(value, -make("blip2_image_train", image_size=28)(picture))
    corner = Corner(std=[1, 1, 1])
    sample = to_sample(corner, read_picture(JPEG, corner))
    assert sample["image"].shape == (3, 2, 2) and sample["image_std"].tolist() == [1, 1, 1]
    size = lambda image: image.size  # noqa: E731
    assert to_sample(size, read_picture(JPEG, size)) == {"image": (90, 61)}
