"""The base of every processor: a callable with settings that may come from a YAML section."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import did_you_mean


class BaseProcessor:
    """A processor that changes nothing; others set `transform` or override `__call__`.

    The keys that its YAML section may have are the arguments of its `__init__`.
    """

    transform: Callable[[Any], Any] | None = None

    def __call__(self, item: Any) -> Any:
        return item if self.transform is None else self.transform(item)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any] | None = None) -> "BaseProcessor":
        """Build the processor from its YAML section (a mapping, or None for all defaults).

        The key `name`, by which the class was found, is passed over. Raises ConfigError for one that `__init__` lacks.
        """
        settings = {key: value for key, value in (cfg or {}).items() if key != "name"}
        known = list(inspect.signature(cls).parameters)
        for key in settings:
            if key not in known:
                name = (cfg or {}).get("name") or cls.__name__
                raise ConfigError(
                    f"Processor {name!r} has no key {key!r}.{did_you_mean(key, known)} "
                    f"Known: {', '.join(known) or 'none'}."
                )
        return cls(**settings)


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture, decoded, with three channels of 8 bits; transparency is dropped, not blended."""
    if image.mode == "RGB":
        image.load()
        return image  # `convert` would copy it
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours as straight to RGB, without Pillow's warning for each file
    return image.convert("RGB")
