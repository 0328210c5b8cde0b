"""laion, cc_sbu (streams of shards) and cc_sbu_align (a folder with a list of captions)."""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset

from minigpt4.common import first_release
from minigpt4.common.errors import ConfigError
from minigpt4.common.facts import cached_features
from minigpt4.common.registry import registry
from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from minigpt4.datasets.datasets.cc_sbu_dataset import CCSBUAlignDataset
from minigpt4.datasets.datasets.feature_dataset import FeatureSet, FeatureStream
from minigpt4.datasets.datasets.image_text_stream import ImageTextStream
from minigpt4.datasets.datasets.shards import how_to_set, listed_storage
from minigpt4.datasets.splits import Share

__getattr__ = first_release.attributes_of(__name__)  # for names that are gone


class ImageTextPairBuilder(BaseDatasetBuilder):
    """Builds "train" from `build_info.storage`, or from the cache `features`, and "val" as `build_splits` says."""

    train_dataset_cls = ImageTextStream
    feature_dataset_cls: type[Dataset] = FeatureStream
    """Reads a cache, in place of `train_dataset_cls`."""

    def build(self) -> dict[str, Dataset]:
        if not self.from_features(self.config):
            return self.build_splits(self.storage(), self.read, self.make)
        if isinstance(val := self.val(), str | list):
            raise ConfigError(
                f"datasets.{self.name}.build_info.val={val!r} does not go with features, which are those of storage. "
                "Give a share, such as 0.02, or train from pictures."
            )
        return self.build_splits(cached_features(self.config), self.read_features, self.make_from_features)

    @classmethod
    def from_features(cls, config: Mapping[str, Any]) -> bool:
        return cached_features(config) is not None

    def read(self, storage: str | list[str]) -> Any:
        """The source of `make`: the storage."""
        return storage

    def make(self, storage: Any, processors: str, share: Share | None) -> Dataset:
        """A dataset of pictures; see `build_splits`."""
        vis_processor, text_processor = self.vis_processors[processors], self.text_processors[processors]
        drawn = {"share": share} if share else {}  # a plug-in's class may have no such argument
        return self.train_dataset_cls(storage, vis_processor, text_processor, name=self.name, **drawn)

    def read_features(self, folder: str) -> Any:
        """The source of `make_from_features`: the folder."""
        return folder

    def make_from_features(self, folder: Any, processors: str, share: Share | None) -> Dataset:
        """A dataset of cached features."""
        return self.feature_dataset_cls(folder, self.text_processors[processors], name=self.name, share=share)

    def storage(self) -> str | list[str]:
        """`build_info.storage`. Raises ConfigError if it names no path or has unknown neighbours."""
        build_info = self.config.get("build_info") or {}
        self.check_keys("build_info", build_info, ("storage", "features", "val"))
        storage, advice = build_info.get("storage"), how_to_set(self.name, f"/data/{self.name}/…")
        paths = listed_storage(storage, self.name, "path", advice)
        return storage if isinstance(storage, str) else paths


@registry.register_builder("laion")
class LaionBuilder(ImageTextPairBuilder):
    """Laion, filtered and recaptioned by BLIP, as img2dataset's tars."""

    name = "laion"
    DATASET_CONFIG_DICT = {"default": "configs/datasets/laion/defaults.yaml"}


@registry.register_builder("cc_sbu")
class CCSBUBuilder(ImageTextPairBuilder):
    """Conceptual Captions and SBU, filtered and recaptioned by BLIP, as img2dataset's tars."""

    name = "cc_sbu"
    DATASET_CONFIG_DICT = {"default": "configs/datasets/cc_sbu/defaults.yaml"}


@registry.register_builder("cc_sbu_align")
class CCSBUAlignBuilder(ImageTextPairBuilder):
    """The descriptions of stage 2. Captions are used unchanged; `text_processor` is ignored."""

    name = "cc_sbu_align"
    train_dataset_cls = CCSBUAlignDataset
    feature_dataset_cls = FeatureSet
    DATASET_CONFIG_DICT = {"default": "configs/datasets/cc_sbu/align.yaml"}

    def read(self, storage: str | list[str]) -> CCSBUAlignDataset:
        return self.train_dataset_cls(storage, self.vis_processors["train"], name=self.name)

    def make(self, records: CCSBUAlignDataset, processors: str, share: Share | None) -> Dataset:
        selected = records.select(share)
        selected.vis_processor = self.vis_processors[processors]
        return selected

    def read_features(self, folder: str) -> FeatureSet:
        return self.feature_dataset_cls(folder, name=self.name)

    def make_from_features(self, records: FeatureSet, processors: str, share: Share | None) -> Dataset:
        return records.select(share)
