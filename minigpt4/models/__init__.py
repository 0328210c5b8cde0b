"""The models. Importing this package registers them."""

from minigpt4.models.base_model import BaseModel
from minigpt4.models.later_release import LaterMiniGPT4
from minigpt4.models.mini_gpt4 import MiniGPT4

__all__ = ["BaseModel", "LaterMiniGPT4", "MiniGPT4"]
