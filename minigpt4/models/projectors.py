"""Projectors map the Q-Former's output to the language model's width. `model.projector` names one.

A projector is a module made of two widths. It maps [...,W] float32 to [...,D]. Checkpoints have its weights as
`llama_proj.*`.
"""

from torch import nn

from minigpt4.common.registry import registry

registry.register_projector("linear")(nn.Linear)


@registry.register_projector("mlp")
class MLP(nn.Sequential):
    """Two linear layers with GELU between them, as in LLaVA 1.5."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(nn.Linear(in_features, out_features), nn.GELU(), nn.Linear(out_features, out_features))
