"""Processors turn a picture into a tensor and a caption into training text. Importing this package registers ours."""

from minigpt4.processors.base_processor import BaseProcessor
from minigpt4.processors.blip_processors import Blip2ImageEvalProcessor, Blip2ImageTrainProcessor, BlipCaptionProcessor
from minigpt4.processors.pixels import normalise, read_picture, to_sample
from minigpt4.processors.rgb import open_image, to_rgb

__all__ = [
    "BaseProcessor",
    "Blip2ImageEvalProcessor",
    "Blip2ImageTrainProcessor",
    "BlipCaptionProcessor",
    "normalise",
    "open_image",
    "read_picture",
    "to_rgb",
    "to_sample",
]
