"""Builders: a section `datasets.<name>` becomes datasets. Importing this package registers ours."""

from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from minigpt4.datasets.builders.conversation_builder import ConversationBuilder
from minigpt4.datasets.builders.image_text_pair_builder import CCSBUAlignBuilder, CCSBUBuilder, LaionBuilder

__all__ = ["BaseDatasetBuilder", "CCSBUAlignBuilder", "CCSBUBuilder", "ConversationBuilder", "LaionBuilder"]
