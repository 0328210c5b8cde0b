"""The base class of dataset builders: the default YAML and the processors."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from torch.utils.data import Dataset

from minigpt4.common import dist_utils, first_release
from minigpt4.common.errors import ConfigError, check_names
from minigpt4.common.registry import default_yaml
from minigpt4.common.schema import RunConfig
from minigpt4.datasets.patience import Patience
from minigpt4.datasets.splits import Share
from minigpt4.processors import BaseProcessor
from minigpt4.processors.base_processor import make_processor

__getattr__ = first_release.attributes_of(__name__)  # for names that are gone


class BaseDatasetBuilder:
    """Makes datasets from a section `datasets.<name>`. Subclasses implement `build`.

    `common.contracts.Builder` describes when each method is called.
    """

    name: str = ""
    """The name of its section, for messages."""
    DATASET_CONFIG_DICT: dict[str, str] = {}
    """{type: default YAML, relative to the package `minigpt4`, or absolute}."""
    data_timeout_s: float = RunConfig.data_timeout_s
    """`run.data_timeout_s`."""
    train_dataset_cls: type[Dataset] | None = None

    def __init__(self, cfg: Mapping[str, Any] | None = None) -> None:
        """cfg: the section with the keys data_type, build_info, vis_processor, text_processor; None: the default's."""
        if cfg is None:
            datasets = OmegaConf.load(self.default_config_path()).datasets
            cfg = datasets.get(self.name) or next(iter(datasets.values()))
        self.config = cfg
        self.vis_processors: dict[str, BaseProcessor] = {}
        self.text_processors: dict[str, BaseProcessor] = {}

    @classmethod
    def default_config_path(cls, type: str = "default") -> str | None:
        """The default YAML of a type; None for a builder without any. Raises KeyError that lists the known types."""
        if not cls.DATASET_CONFIG_DICT:
            return None
        return str(default_yaml(cls.DATASET_CONFIG_DICT, type, f"{cls.name or cls.__name__} has no type"))

    def build_datasets(self) -> dict[str, Dataset]:
        """{split: dataset}."""
        self.build_processors()
        datasets = self.build()
        for dataset in datasets.values():
            if isinstance(patience := getattr(dataset, "patience", None), Patience):
                patience.timeout_s = dist_utils.own_patience(self.data_timeout_s)
        return datasets

    def build(self) -> dict[str, Dataset]:
        """{split: dataset}, from `self.config`, `self.vis_processors` and `self.text_processors`."""
        raise NotImplementedError(f"{type(self).__name__} must define build(self) -> {{split: dataset}}.")

    @classmethod
    def from_features(cls, config: Mapping[str, Any]) -> bool:
        """Whether the section reads cached image features instead of pictures."""
        return False

    def val(self) -> float | str | list[str] | None:
        """`build_info.val`: the share of the records in the split "val", or its files; None: there is no such split.

        Raises ConfigError for anything else.
        """
        key, val = f"datasets.{self.name}.build_info.val", (self.config.get("build_info") or {}).get("val")
        if isinstance(val, int | float):
            if not 0 < val < 1:
                raise ConfigError(f"{key}={val} must be a share of more than 0 and less than 1, or name files.")
        elif val is not None and not isinstance(val, str):
            if not isinstance(val, Sequence) or not all(isinstance(each, str) for each in val):
                raise ConfigError(f"{key}={val!r} is no share, no path and no list of paths.")
            return list(val)
        return val

    def build_splits(
        self, storage: Any, read: Callable[[Any], Any], make: Callable[[Any, str, Share | None], Dataset]
    ) -> dict[str, Dataset]:
        """The splits "train" and, with `val`, "val".

        read: from `storage`, or the files of `val`, to a source of records.
        make: the dataset of a source, with the processors of "train" or "eval"; of a share of its records, or all.
        """
        val, source = self.val(), read(storage)
        if val is None:
            return {"train": make(source, "train", None)}
        if isinstance(val, int | float):
            return {"train": make(source, "train", Share(val, False)), "val": make(source, "eval", Share(val, True))}
        try:
            others = make(read(val), "eval", None)
        except (ConfigError, OSError) as error:
            raise type(error)(str(error).replace("build_info.storage", "build_info.val")) from None
        return {"train": make(source, "train", None), "val": others}

    def build_processors(self) -> None:
        """Fill `vis_processors` and `text_processors`. A split without processor gets one that changes nothing."""
        self.vis_processors = self._processors("vis_processor")
        self.text_processors = self._processors("text_processor")

    def _processors(self, kind: str) -> dict[str, BaseProcessor]:
        section = self.config.get(kind) or {}
        splits = ("train", "eval")
        self.check_keys(kind, section, splits)
        return {split: make_processor(f"datasets.{self.name}.{kind}.{split}", section.get(split)) for split in splits}

    def check_keys(self, section: str, keys: Iterable[str], known: Collection[str]) -> None:
        """Raise ConfigError for a key of `datasets.<name>.<section>` that is not among the known ones."""
        check_names(keys, known, lambda key: f"Unknown key datasets.{self.name}.{section}.{key}")
