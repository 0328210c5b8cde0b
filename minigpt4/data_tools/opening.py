"""From a config, or the files that a user names, to the sources of their records."""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf

from minigpt4.common.errors import ConfigError
from minigpt4.common.facts import cached_features
from minigpt4.data_tools.plugins import PluginSource
from minigpt4.data_tools.sources import ALIGN_FILE, AlignSource, FileSource, ShardSource, Source, shorten
from minigpt4.datasets.conversations.formats import read_records
from minigpt4.datasets.conversations.shards import ShardRecords
from minigpt4.datasets.conversations.stream import ConversationStream
from minigpt4.processors import BaseProcessor

# Builders whose files are read; those of plug-ins make samples.
OURS = ("conversation", "cc_sbu_align", "laion", "cc_sbu")


def sources_of_config(cfg: Any) -> Iterator[Source]:
    """The datasets of a `Config`. Raises ConfigError for data that cannot be opened at all.

    A share for validation is read with the rest; files for validation are a dataset of their own.
    """
    for name in cfg.datasets_cfg:
        section, builder = cfg.datasets_cfg[name], cfg.builder(name)
        if cached_features(section):
            raise ConfigError(f"datasets.{name} reads cached features. Set build_info.features=null to read pictures.")
        if builder not in OURS:
            for split, dataset in built(cfg, name).items():
                yield PluginSource(name if split == "train" else f"{name}.{split}", dataset)
            continue
        info = section.get("build_info") or {}
        val = make_builder(cfg, name, section).val()
        storages = {name: info.get("storage")} | ({} if isinstance(val, float | int | None) else {f"{name}.val": val})
        for full_name, storage in storages.items():
            if builder == "conversation":
                try:
                    yield conversations(full_name, storage, info)
                except (ConfigError, FileNotFoundError) as error:
                    text = str(error).replace(f"{name}.val.build_info.storage", f"{name}.build_info.val")
                    raise ConfigError(text.replace(f"{name}.val.build_info", f"{name}.build_info")) from None
            elif builder == "cc_sbu_align" and isinstance(storage, str):
                yield AlignSource(full_name, storage)
            else:
                yield ShardSource(full_name, built(cfg, name, {"storage": storage, "val": None})["train"])


def source_of_files(storage: list[str], info: Mapping[str, Any]) -> Source:
    """A user's files without a config, a folder of cc_sbu_align's form too. info: as for `conversations`."""
    if len(storage) == 1 and not info.get("format"):
        folder = os.path.expanduser(storage[0])
        if os.path.isfile(os.path.join(folder, ALIGN_FILE)):
            return AlignSource("data", folder)
    return conversations("data", storage, info)


def conversations(name: str, storage: Any, info: Mapping[str, Any]) -> Source:
    """The records of `storage` as the builder `conversation` reads them.

    info: may have its keys `images`, `format` and `columns`.
    """
    format, columns = info.get("format") or "auto", info.get("columns")
    kind, records = read_records(storage, info.get("images"), format, columns, name, check=False)
    if isinstance(records, ShardRecords):
        return ShardSource(name, ConversationStream(records, BaseProcessor(), name))
    return FileSource(name, f"{shorten([storage] if isinstance(storage, str) else storage)}, read as {kind}", records)


def built(cfg: Any, name: str, build_info: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The splits of a dataset that its builder makes. build_info: keys that are changed before."""
    section = cfg.datasets_cfg[name]
    builder = make_builder(cfg, name, OmegaConf.merge(section, {"build_info": build_info}) if build_info else section)
    builder.data_timeout_s = 0.0
    return builder.build_datasets()


def make_builder(cfg: Any, name: str, section: Any) -> Any:
    """The builder of a dataset."""
    builder = cfg.builder_class(name)(section)
    builder.name = name
    return builder


def processor_of(cfg: Any, source: Source) -> Callable:
    """The image processor of a dataset in training. Without a config, and for a plug-in's, one that changes nothing."""
    if cfg is None or isinstance(source, PluginSource):
        return BaseProcessor()
    name = source.name.removesuffix(".val")
    builder = make_builder(cfg, name, cfg.datasets_cfg[name])
    builder.build_processors()
    return builder.vis_processors["train" if name == source.name else "eval"]
