"""How good answers are: tasks, references, figures. Importing this package registers our tasks; it needs no torch."""

from minigpt4.evaluation import tasks
from minigpt4.evaluation.example import Answer, Example
from minigpt4.evaluation.figures import Figure, mean

__all__ = ["Answer", "Example", "Figure", "mean", "tasks"]
