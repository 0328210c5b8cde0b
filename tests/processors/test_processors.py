"""Processors against the golden data, and what they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms

from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.processors import BaseProcessor, to_rgb

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CONTENT = json.loads((GOLDEN / "processors.json").read_text(encoding="utf-8"))
TENSORS = load_file(GOLDEN / "processors.safetensors")
IMAGE_PROCESSORS = ["blip2_image_eval", "blip2_image_train"]


def make(name: str, **cfg):
    return registry.get_processor_class(name).from_config({"name": name, **cfg})


def picture(name: str) -> Image.Image:
    return Image.open(GOLDEN / CONTENT["image_eval"][name]["file"])


def test_these_are_all():
    ours = [n for n in registry.list_processors() if registry.get_processor_class(n).__module__.startswith("minigpt4.")]
    assert ours == ["blip2_image_eval", "blip2_image_train", "blip_caption"]


@pytest.mark.parametrize("name", registry.list_processors())
def test_every_processor_builds_from_nothing_and_refuses_unknown_keys(name):
    cls = registry.get_processor_class(name)
    assert isinstance(cls.from_config(None), cls)
    assert isinstance(cls.from_config(OmegaConf.create({"name": name})), cls)
    with pytest.raises(ValueError, match=f"{name}.*'image_sise'.*Known: "):
        cls.from_config({"name": name, "image_sise": 28})


def test_unknown_key_has_a_suggestion():
    with pytest.raises(ValueError, match="Did you mean 'image_size'"):
        make("blip2_image_eval", image_sise=28)


@pytest.mark.parametrize("kind", ["caption_default", "caption_with_prompt"])
def test_caption_golden(kind):
    golden = CONTENT[kind]
    processor = make("blip_caption", prompt=golden["prompt"], max_words=golden["max_words"])
    assert len(golden["cases"]) > 10
    for case in golden["cases"]:
        assert processor(case["input"]) == case["output"]


@pytest.mark.parametrize("key", [k for k in TENSORS if k.startswith("eval.")])
def test_eval_golden(key):
    _, name, size = key.split(".")
    output = make("blip2_image_eval", image_size=int(size))(picture(name))
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, TENSORS[key], atol=1e-5, rtol=0)


def test_eval_golden_at_the_default_size():
    arrays = np.load(GOLDEN / "image_eval_224.npz")
    ((key, expected),) = arrays.items()
    name = next(n for n in CONTENT["image_eval"] if n in key)
    output = make("blip2_image_eval")(picture(name))
    torch.testing.assert_close(output, torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_eval_golden_with_other_mean_and_std():
    cfg = OmegaConf.create({"image_size": 28, **CONTENT["image_eval_custom"]})
    output = registry.get_processor_class("blip2_image_eval").from_config(cfg)(picture("wide"))
    torch.testing.assert_close(output, TENSORS["eval_custom_mean_std.wide.28"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("j", range(len(CONTENT["train_crops"])))
def test_train_golden(j, monkeypatch):
    crop = CONTENT["train_crops"][j]
    box = tuple(crop[k] for k in ("top", "left", "height", "width"))
    monkeypatch.setattr(transforms.RandomResizedCrop, "get_params", staticmethod(lambda *args: box))
    output = make("blip2_image_train", image_size=28)(picture(crop["image"]))
    torch.testing.assert_close(output, TENSORS[f"train.{j}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("cfg", "size", "scale"), [({}, (224, 224), (0.5, 1.0)), (None, (28, 28), (0.2, 0.9))])
def test_train_crop_settings(cfg, size, scale):
    if cfg is None:
        cfg = {k: CONTENT["train_transform_overrides"][k] for k in ("image_size", "min_scale", "max_scale")}
    steps = make("blip2_image_train", **cfg).transform.transforms
    golden = CONTENT["train_transform"]
    assert [type(step).__name__ for step in steps] == golden["sequence"]
    assert (steps[0].size, steps[0].scale) == (size, scale)
    assert steps[0].ratio == pytest.approx(golden["ratio"])
    assert str(steps[0].interpolation) == golden["interpolation"]


def test_train_draws_another_crop_each_time():
    processor = make("blip2_image_train", image_size=28)
    image = picture("rgb")
    assert not torch.equal(processor(image), processor(image))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "YCbCr", "F"])
@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
def test_any_mode(name, mode, recwarn):
    image = Image.new(mode, (9, 5))
    if mode == "P":
        image.info["transparency"] = b"\x00" * 256
    output = make(name, image_size=28)(image)
    assert output.shape == (3, 28, 28) and output.dtype == torch.float32
    assert not recwarn.list


def test_palette_with_transparency_keeps_its_colours():
    image = picture("rgb").convert("P")
    plain = image.convert("RGB")
    image.info["transparency"] = b"\x00" * 256
    assert to_rgb(image).tobytes() == plain.tobytes()


@pytest.mark.parametrize("name", IMAGE_PROCESSORS)
@pytest.mark.parametrize("size", [0, -1, 2.5, "224"])
def test_bad_image_size(name, size):
    with pytest.raises(ValueError, match="image_size=.*whole number"):
        make(name, image_size=size)


def test_bad_scale_and_max_words():
    with pytest.raises(ValueError, match="min_scale <= max_scale"):
        make("blip2_image_train", min_scale=0.9, max_scale=0.2)
    with pytest.raises(ValueError, match="max_scale"):
        make("blip2_image_train", max_scale=2)
    with pytest.raises(ValueError, match="max_words=0"):
        make("blip_caption", max_words=0)


def test_base_processor_changes_nothing_and_takes_a_transform():
    assert BaseProcessor.from_config({"name": "anything"})(3) == 3
    doubled = BaseProcessor()
    doubled.transform = lambda item: 2 * item
    assert doubled(3) == 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_scale": "abc"}, "min_scale='abc' must be a number"),
        ({"min_scale": float("nan")}, "min_scale=nan"),
        ({"mean": 3}, "mean=3"),
        ({"mean": [1, 2]}, "three numbers"),
        ({"mean": [0.1, "a", 0.2]}, "mean="),
        ({"std": [1, 1, 0]}, "three numbers"),
        ({"image_size": True}, "image_size=True must be a whole number"),
    ],
)
def test_arguments_of_another_type(settings, message):
    with pytest.raises(ConfigError, match=message):
        make("blip2_image_train", **settings)


def test_types_of_a_plugins_processor():
    class Mine(BaseProcessor):
        def __init__(self, size: tuple[int, int] = (1, 1), name_of: str = None, scale: float = 1.0, free=None):  # noqa: RUF013
            self.arguments = size, name_of, scale, free

    settings = {"size": [2, 3], "name_of": None, "scale": 2, "free": {"a": [1]}}
    assert Mine.from_config(OmegaConf.create(settings)).arguments == ((2, 3), None, 2.0, {"a": [1]})
    assert Mine.from_config({"free": print}).arguments[3] is print  # from Python
    with pytest.raises(ConfigError, match="size="):
        Mine.from_config({"size": [1]})
