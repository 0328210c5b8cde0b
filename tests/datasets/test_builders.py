"""Builders: every one builds from its section; bad sections are refused with the key's name."""

import pytest
import torch
from dataset_files import TEXT, VIS, write_align, write_shards
from omegaconf import OmegaConf
from torch.utils.data import IterableDataset

from minigpt4.common.registry import registry
from minigpt4.datasets.builders import BaseDatasetBuilder
from minigpt4.processors import BaseProcessor

STORAGE = {"laion": "shards", "cc_sbu": "shards", "cc_sbu_align": "align"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def section(shards, tmp_path):
    align = write_align(tmp_path / "align")

    def make(name: str, **changes):
        storage = {"shards": f"{shards}/{{00000..00003}}.tar", "align": str(align)}[STORAGE[name]]
        cfg = {"data_type": "images", "build_info": {"storage": storage}, "vis_processor": VIS, "text_processor": TEXT}
        return OmegaConf.create({**cfg, "sample_ratio": 14, **changes})

    return make


def ours() -> list[str]:
    """The builders of the shipped datasets. `conversation`, of a user's own, has tests of its own."""
    builders = {name: registry.get_builder_class(name) for name in registry.list_builders()}
    return [n for n, cls in builders.items() if cls.__module__.startswith("minigpt4.") and n != "conversation"]


def test_these_are_all():
    assert ours() == sorted(STORAGE)


@pytest.mark.parametrize("name", ours())
def test_every_builder(name, section):
    cls = registry.get_builder_class(name)
    assert cls.name == name
    default = OmegaConf.load(cls.default_config_path())
    assert list(default.datasets) == [name] and default.datasets[name].build_info.storage.startswith("/path/to/")
    datasets = cls(section(name)).build_datasets()
    assert list(datasets) == ["train"]
    sample = next(iter(datasets["train"]))
    assert sample["image"].shape == (3, 16, 16) and sample["image"].dtype == torch.uint8
    is_stream = isinstance(datasets["train"], IterableDataset)
    assert is_stream == (name != "cc_sbu_align")
    assert sample["text_input"].startswith("sample " if is_stream else "Caption Number ")


@pytest.mark.parametrize("name", ours())
def test_the_default_placeholder_is_refused(name):
    with pytest.raises(
        FileNotFoundError, match=rf"datasets\.{name}\.build_info\.storage=/path/to/.*--options '?datasets"
    ):
        registry.get_builder_class(name)().build_datasets()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"build_info": {}}, r"datasets\.laion\.build_info\.storage=None names no path"),
        ({"build_info": {"storage": "x", "sotrage": "y"}}, r"laion\.build_info\.sotrage.*Did you mean 'storage'"),
        ({"vis_processor": {"trian": {}}}, r"laion\.vis_processor\.trian.*Did you mean 'train'"),
        ({"vis_processor": {"train": {"image_size": 16}}}, r"laion\.vis_processor\.train has no key 'name'"),
        ({"vis_processor": {"train": {"name": "blip2_image_train", "size": 16}}}, "no key 'size'"),
    ],
)
def test_bad_sections(section, changes, message):
    with pytest.raises(ValueError, match=message):
        registry.get_builder_class("laion")(section("laion", **changes)).build_datasets()


def test_unknown_processor(section):
    cfg = section("laion", vis_processor={"train": {"name": "blip2_image_trian"}})
    with pytest.raises(KeyError, match="Did you mean 'blip2_image_train'"):
        registry.get_builder_class("laion")(cfg).build_datasets()


def test_without_processors_nothing_is_changed(section):
    builder = registry.get_builder_class("cc_sbu")(section("cc_sbu", vis_processor=None, text_processor={}))
    sample = next(iter(builder.build_datasets()["train"]))
    assert type(builder.vis_processors["train"]) is BaseProcessor
    assert sample["image"].size == (20, 20) and sample["text_input"].startswith("Sample ")


def test_a_list_in_a_config_is_a_storage(section, shards):
    cfg = section("cc_sbu", build_info={"storage": [f"{shards}/00000.tar", f"{shards}/0000[12].tar"]})
    assert len(registry.get_builder_class("cc_sbu")(cfg).build_datasets()["train"].shards) == 3


def test_plugin_builder_with_more_splits(tmp_path):
    class Folder(registry.get_builder_class("cc_sbu_align")):
        name = "my_folder"

        def build(self):
            storage, vis = self.storage(), self.vis_processors
            return {
                split: self.train_dataset_cls(storage, vis[key]) for split, key in (("train", "train"), ("val", "eval"))
            }

    write_align(tmp_path)
    datasets = Folder({"build_info": {"storage": str(tmp_path)}, "vis_processor": VIS}).build_datasets()
    assert list(datasets) == ["train", "val"]
    assert datasets["val"][0]["image"].mode == "RGB"


def test_base_builder():
    with pytest.raises(NotImplementedError, match="must define build"):
        BaseDatasetBuilder({}).build_datasets()
    assert BaseDatasetBuilder.default_config_path() is None
    with pytest.raises(KeyError, match="laion has no type 'large'. Known: default"):
        registry.get_builder_class("laion").default_config_path("large")
