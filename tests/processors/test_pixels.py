"""Pictures as uint8, normalised later: the crop of the float form and, within a stated rounding, its values."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision import transforms

from minigpt4.cli.bench_data import photograph
from minigpt4.common.registry import registry
from minigpt4.processors import Blip2ImageEvalProcessor, Blip2ImageTrainProcessor, normalise, to_rgb, to_sample
from minigpt4.runners.state import to_device

NAMES = ["blip2_image_eval", "blip2_image_train"]


def make(name: str, **cfg):
    return registry.get_processor_class(name).from_config({"name": name, **cfg})


def photo(seed: int, width: int, height: int) -> Image.Image:
    return Image.open(io.BytesIO(photograph(seed, width, height)))


def levels(processor, image: Image.Image, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two forms of a picture in grey levels [3,S,S], their crops drawn from the same seed."""
    torch.manual_seed(seed)
    floats = processor(image) * processor.std[:, None, None] + processor.mean[:, None, None]
    torch.manual_seed(seed)
    return processor.pixels(image).float(), (floats * 255).round()


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
    """Lines one pixel wide become grey; picking every fourth pixel would keep them black and white."""
    lines = np.zeros((800, 800, 3), dtype=np.uint8)
    lines[:, ::2] = 255
    inner = make("blip2_image_eval", image_size=200).pixels(Image.fromarray(lines))[:, 5:-5, 5:-5].float()
    assert (inner - 127.5).abs().max() < 10


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "YCbCr", "F"])
@pytest.mark.parametrize("name", NAMES)
def test_any_mode_as_pillow_converts_it(name, mode):
    image = photo(0, 90, 60)
    image = Image.new(mode, (90, 60)) if mode == "I;16" else image.convert(mode)
    torch.manual_seed(0)
    ours = make(name, image_size=28).pixels(image)
    torch.manual_seed(0)
    assert torch.equal(ours, make(name, image_size=28).pixels(to_rgb(image)))
    assert ours.shape == (3, 28, 28) and ours.dtype == torch.uint8


def test_orientation_in_exif_is_not_applied():
    """As in the first release, which trained so."""
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(0, 40, 20).save(buffer, "JPEG", exif=exif)
    turned, plain = Image.open(buffer), Image.open(buffer).convert("RGB")
    plain.info.clear()
    processor = make("blip2_image_eval", image_size=28)
    assert torch.equal(processor.pixels(turned), processor.pixels(plain))


def test_crops_are_drawn_again_and_repeat_by_seed():
    processor, image = make("blip2_image_train"), photo(0, 256, 256)
    torch.manual_seed(1)
    first, second = processor.pixels(image), processor.pixels(image)
    torch.manual_seed(1)
    assert torch.equal(processor.pixels(image), first)
    assert not torch.equal(first, second)


def test_normalised_on_the_device_as_torchvision_does():
    """Bit for bit, with each sample's own mean and std."""
    images = [photo(seed, 60, 60) for seed in range(2)]
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
    """A plug-in that changes what is called, as those for LAVIS do."""

    def __call__(self, image):
        return -super().__call__(image)


class Corner(Blip2ImageEvalProcessor):
    """A plug-in with pixels of its own."""

    def pixels(self, image):
        return torch.zeros(3, 2, 2, dtype=torch.uint8)


def test_a_subclass_is_called_unless_it_has_pixels_of_its_own():
    image = photo(0, 60, 60)
    torch.manual_seed(0)
    (value,) = to_sample(Inverted(image_size=28), image).values()
    torch.manual_seed(0)
    assert torch.equal(value, -make("blip2_image_train", image_size=28)(image))
    sample = to_sample(Corner(std=[1, 1, 1]), image)
    assert sample["image"].shape == (3, 2, 2) and sample["image_std"].tolist() == [1, 1, 1]
    assert to_sample(lambda picture: picture.size, image) == {"image": (60, 60)}
