"""Processors turn a picture into a tensor and a caption into training text. Importing this package registers ours."""

from minigpt4.common.rgb import to_rgb
from minigpt4.processors.base_processor import BaseProcessor
from minigpt4.processors.blip_processors import Blip2ImageEvalProcessor, Blip2ImageTrainProcessor, BlipCaptionProcessor
from minigpt4.processors.pixels import normalise, read_picture, to_sample

__all__ = [
    "BaseProcessor",
    "Blip2ImageEvalProcessor",
    "Blip2ImageTrainProcessor",
    "BlipCaptionProcessor",
    "normalise",
    "read_picture",
    "to_rgb",
    "to_sample",
]
