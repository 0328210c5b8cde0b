"""Datasets of cached image features: a stream of shards, and a set with a length. No picture is decoded."""

import logging
import tarfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from minigpt4.common.errors import ConfigError
from minigpt4.common.text import pluralize
from minigpt4.datasets.captions import Unusable, load_json, usable
from minigpt4.datasets.datasets.image_text_stream import ImageTextStream, RawSample
from minigpt4.datasets.datasets.packed_strings import PackedStrings
from minigpt4.datasets.datasets.record_dataset import CaptionedRecords
from minigpt4.datasets.datasets.tar_reader import Group
from minigpt4.datasets.feature_cache import IDENTITIES, read_features, read_manifest, shards_of
from minigpt4.datasets.left_out import Tally
from minigpt4.datasets.patience import OutOfReach, Patience, folder_in_reach
from minigpt4.datasets.samples import Sample
from minigpt4.datasets.splits import Share

log = logging.getLogger(__name__)


class FeatureStream(ImageTextStream):
    """As `ImageTextStream`, from a cache: `{"image_features": float16 [Q,W], "text_input": …, "image_id": …}`."""

    MEMBERS = ("npy",)
    WHAT = "features"

    def __init__(
        self, folder: str, text_processor: Callable[[str], str], name: str = "image_text", share: Share | None = None
    ) -> None:
        """Raises ConfigError for a folder that is no cache, or is incomplete, or without identities to draw `share`."""
        self.manifest = read_manifest(folder)
        if share and not self.manifest.get(IDENTITIES):
            raise ConfigError(
                f"datasets.{name}.build_info.val={share.val}: the cache {folder} is of an earlier version, which does "
                "not say which pictures are in val. Make it again with cache-features, in another folder."
            )
        super().__init__([str(path) for path in shards_of(folder)], None, text_processor, name, share=share)

    def raw_sample(self, shard: str, group: Group) -> RawSample:
        raw = super().raw_sample(shard, group)
        with suppress(KeyError, TypeError, Unusable):
            text = load_json(group.files["json"])
            own = text["image_id"], raw.image, raw.caption, raw.size, text.get("identity", "")
            return RawSample(shard, raw.key, *own)
        return raw

    def image_fields(self, sample: RawSample) -> dict[str, Any]:
        """The features. Raises Unusable if they are broken."""
        try:
            return {"image_features": read_features(sample.image, self.manifest["shape"])}
        except (ValueError, EOFError) as error:
            raise Unusable("features that are broken") from error


class FeatureSet(CaptionedRecords, Dataset):
    """The samples of a cache by index: `{"image_features": float16 [Q,W], "text_input": str, "image_id": str}`.

    Samples have the order of the cached dataset, without the records whose pictures were broken or whose captions are
    not usable (`datasets.captions`). Captions are used unchanged.
    """

    FIELDS = ("image_ids", "captions", "places")

    def __init__(self, folder: str, name: str = "cc_sbu_align") -> None:
        """Raises ConfigError for a folder that is no cache, or is incomplete or broken."""
        self.manifest = read_manifest(folder)
        self.shards = shards_of(folder)
        self.name = name
        self.tally = Tally(name)
        self.patience = Patience(self.tally, folder_in_reach)
        found = [(number, *sample) for number, path in enumerate(self.shards) for sample in _index(path)]
        samples = [sample for sample in found if _is_usable(sample[-1])]
        if unusable := len(found) - len(samples):
            log.warning("%s: left out %s whose captions cannot be used.", name, pluralize(unusable, "record"))
        self.places = np.array([place for *place, _ in samples], dtype=np.int64).reshape(-1, 3)
        self.captions = PackedStrings(text["caption"] for *_, text in samples)
        self.image_ids = PackedStrings(text["image_id"] for *_, text in samples)
        log.info("%s: %s of cached features.", name, pluralize(len(self), "record"))

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = range(len(self))[index]
        number, offset, size = self.places[index]
        path = self.shards[number]
        try:
            content = self.patience.retry(lambda: _read_part(path, offset, size), str(path))
            features = read_features(content, self.manifest["shape"])
        except (ValueError, EOFError, OutOfReach) as error:
            raise _broken(path, error) from error
        fields = {"image_features": features, "text_input": self.captions[index], "image_id": self.image_ids[index]}
        return Sample(fields, str(path))

    def take_left_out(self) -> Counter[tuple[str, ...]]:
        """Counts of the waits of this process since the last call."""
        return self.tally.take()


def _read_part(path: Path, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _is_usable(text: Any) -> bool:
    with suppress(Unusable, KeyError, TypeError):
        return bool(usable(text["caption"])) and isinstance(text["image_id"], str)
    return False


def _index(path: Path) -> list[tuple[int, int, dict[str, str]]]:
    """For each sample of a shard: offset and size in bytes of its features, and its caption and image_id."""
    places, texts = [], []
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".npy"):
                    places.append((member.offset_data, member.size))
                else:
                    texts.append(load_json(tar.extractfile(member).read()))
        return [(offset, size, text) for (offset, size), text in zip(places, texts, strict=True)]
    except (OSError, tarfile.TarError, ValueError) as error:
        raise _broken(path, error) from error


def _broken(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path} is broken ({error}). Delete it and run the same cache-features command again.")
