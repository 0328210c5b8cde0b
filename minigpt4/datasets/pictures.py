"""The one place that decides which picture can be trained on."""

from collections.abc import Callable
from typing import Any

from minigpt4.datasets.captions import Unusable
from minigpt4.processors import read_picture, to_sample

BROKEN = "an image that is not one, or is broken"


def load_picture(content: bytes, vis_processor: Callable) -> dict[str, Any]:
    """ "image" and its companions (`to_sample`) of a picture's file. Raises Unusable for what is no picture."""
    try:
        picture = read_picture(content, vis_processor)
    except Exception as error:  # Pillow's plug-ins raise nearly every kind of error on broken files
        raise Unusable(BROKEN) from error
    return to_sample(vis_processor, picture)
