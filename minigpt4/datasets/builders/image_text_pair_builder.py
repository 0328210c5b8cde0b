"""laion, cc_sbu (streams of shards) and cc_sbu_align (a folder with a list of captions)."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset

from minigpt4.common.errors import ConfigError
from minigpt4.common.facts import cached_features
from minigpt4.common.registry import registry
from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from minigpt4.datasets.datasets.cc_sbu_dataset import CCSBUAlignDataset
from minigpt4.datasets.datasets.feature_dataset import FeatureSet, FeatureStream
from minigpt4.datasets.datasets.image_text_stream import ImageTextStream


class ImageTextPairBuilder(BaseDatasetBuilder):
    """Builds the split "train" from `build_info.storage` and the train processors, or from the cache `features`."""

    train_dataset_cls = ImageTextStream
    feature_dataset_cls: type[Dataset] = FeatureStream
    """Reads a cache, in place of `train_dataset_cls`."""

    def build(self) -> dict[str, Dataset]:
        processors = self.processors()
        if self.from_features(self.config):
            del processors["vis_processor"]
            return {"train": self.feature_dataset_cls(cached_features(self.config), name=self.name, **processors)}
        return {"train": self.train_dataset_cls(self.storage(), name=self.name, **processors)}

    @classmethod
    def from_features(cls, config: Mapping[str, Any]) -> bool:
        return cached_features(config) is not None

    def processors(self) -> dict:
        """The keyword arguments of the dataset that are processors."""
        return {"vis_processor": self.vis_processors["train"], "text_processor": self.text_processors["train"]}

    def storage(self) -> str | list[str]:
        """`build_info.storage`. Raises ConfigError if it is missing or has unknown neighbours."""
        build_info = self.config.get("build_info") or {}
        self.check_keys("build_info", build_info, ("storage", "features"))
        storage = build_info.get("storage")
        if not storage:
            key = f"datasets.{self.name}.build_info.storage"
            raise ConfigError(f"{key} is not set. Set it in the YAML or with --options {key}=/data/{self.name}/…")
        texts = [storage] if isinstance(storage, str) else storage
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(
                f"datasets.{self.name}.build_info.storage = {storage!r} is no path, and no list of paths."
            )
        return storage if isinstance(storage, str) else list(texts)


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

    def processors(self) -> dict:
        return {"vis_processor": self.vis_processors["train"]}
