"""Endless streams of pictures with captions from webdataset shards: laion and cc_sbu."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from PIL import Image

from minigpt4.common.errors import ConfigError
from minigpt4.datasets.captions import Incomplete, Unusable, read_caption, usable
from minigpt4.datasets.datasets.shard_stream import ShardStream
from minigpt4.datasets.datasets.shards import expand_shards
from minigpt4.datasets.datasets.tar_reader import Group, member_id
from minigpt4.datasets.pictures import load_picture
from minigpt4.datasets.splits import Share, content_identity

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")


class RawSample(NamedTuple):
    """A sample in the shuffle buffer, its picture not decoded yet."""

    shard: str
    key: str
    image_id: str
    image: bytes
    caption: str
    size: int  # bytes in the tar
    identity: str = ""
    """Of the picture, if `image` is not its file."""


class ImageTextStream(ShardStream):
    """A `ShardStream` of `{"image": …, "text_input": text_processor(caption), "image_id": str}`.

    `to_sample` makes "image" and its companions. Samples without picture or usable caption (`datasets.captions`) and
    pictures that cannot be decoded are left out. `share` draws by the content of the picture's file.
    """

    MEMBERS = IMAGE_KEYS  # the members of a sample that may hold the picture
    WHAT = "picture"

    def __init__(
        self,
        storage: str | Sequence[str],
        vis_processor: Callable[[Image.Image], Any],
        text_processor: Callable[[str], str],
        name: str = "image_text",
        shuffle_buffer: int = 1000,
        share: Share | None = None,
    ) -> None:
        """storage: see `expand_shards`. name: the dataset's name in the YAML, for messages.

        Raises ConfigError for a subclass that overrides a method which training does not call.
        """
        for method, called in (("load", "image_fields"), ("text_of", "processed_text")):
            if getattr(type(self), method) is not getattr(ImageTextStream, method):
                raise ConfigError(
                    f"datasets.{name}: {type(self).__name__} overrides {method}, which training does not call. "
                    f"Override {called}: training and {method} call it."
                )
        super().__init__(expand_shards(storage, name), name, share, shuffle_buffer)
        self.vis_processor, self.text_processor = vis_processor, text_processor

    def raw_sample(self, shard: str, group: Group) -> RawSample:
        image = next((group.files[suffix] for suffix in self.MEMBERS if suffix in group.files), None)
        if image is None:
            raise Incomplete(f"a sample without {self.WHAT} (.{', .'.join(self.MEMBERS)})")
        caption = read_caption(group.files)
        return RawSample(shard, group.key, member_id(shard, group.key), image, caption, group.size)

    def identity(self, sample: RawSample) -> str:
        return sample.identity or content_identity(sample.image)

    def decode(self, sample: RawSample) -> dict[str, Any]:
        text = self.processed_text(sample)
        return {**self.image_fields(sample), "text_input": text, "image_id": sample.image_id}

    def image_fields(self, sample: RawSample) -> dict[str, Any]:
        """ "image" and its companions. Raises Unusable for a picture that cannot be decoded."""
        return load_picture(sample.image, self.vis_processor)

    def processed_text(self, sample: RawSample) -> str:
        """The caption after `text_processor`. Raises Unusable if that leaves nothing that can be used."""
        try:
            return usable(self.text_processor(sample.caption))
        except Unusable as cause:
            raise Unusable(f"{cause}, after text_processor") from ValueError(sample.caption)

    def load(self, sample: RawSample) -> dict[str, Any] | None:
        """`image_fields`; None, counted as left out, for a picture that cannot be decoded."""
        return self.if_usable(self.image_fields, sample)

    def text_of(self, sample: RawSample) -> str | None:
        """`processed_text`; None, counted as left out, if nothing is left that can be used."""
        return self.if_usable(self.processed_text, sample)

    def texts(self) -> Iterator[tuple[str, str]]:
        """(image id, caption after `text_processor`) of the usable captions, in the order of the shards."""
        texts = ((sample.image_id, self.text_of(sample)) for sample in self.raw_samples(self.shards))
        return ((image_id, text) for image_id, text in texts if text is not None)
