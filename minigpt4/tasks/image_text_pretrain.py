"""Learn to write the text of an image, in stage 1 and stage 2."""

from minigpt4.common.registry import registry
from minigpt4.tasks.base_task import BaseTask


@registry.register_task("image_text_pretrain")
class ImageTextPretrainTask(BaseTask):
    """The model computes the loss; nothing of `BaseTask` changes."""
