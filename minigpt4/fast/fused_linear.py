"""Layers that read the same input, computed by one matrix product: query, key and value; gate and up.

One product of three times the width uses a GPU better than three. In the backward pass it gives the gradient of the
input at once, where three products give three to be added.

A `FusedLinear` has the joint layer. In the place of each layer that it fuses stands a `FusedSlice`, which asks it for
its part of the product by name, so that the model may call the layers in any order. The weights keep their names in the
state dict: they are views of the joint layer's.
"""

from collections.abc import Iterator

import torch
from torch import nn

from minigpt4.quantization.bitsandbytes import LowBitLinear

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class FusedLinear:
    """Several linear layers with the same input [...,K] as one, the `joint` layer: [...,N1+N2+…].

    The joint layer is an nn.Linear, or of a quantised kind; `replace_joint` exchanges it.
    """

    def __init__(self, joint: nn.Module, names: list[str], widths: list[int]):
        self.joint, self.names, self.widths = joint, names, widths
        self.slices = [FusedSlice(self, name, width) for name, width in zip(names, widths, strict=True)]
        self.replace_joint(joint)
        # The input and the outputs that were not fetched yet, exchanged together: threads may share the model.
        self._computed: tuple[torch.Tensor | None, dict[str, torch.Tensor]] = None, {}

    def replace_joint(self, joint: nn.Module) -> None:
        """Compute the product by another layer, whose weights the slices show from now on."""
        self.joint = joint
        rows_per_output = len(joint.weight) / sum(self.widths)  # other than 1 where 4-bit weights are packed
        parts = joint.weight.data.split([int(width * rows_per_output) for width in self.widths])
        for part, fused_slice in zip(parts, self.slices, strict=True):
            fused_slice.weight = nn.Parameter(part, requires_grad=False)

    def output(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The output [...,N] of the layer `name` for x [...,K]; the first call with an x computes those of all."""
        known_input, outputs = self._computed
        if known_input is not x or name not in outputs:
            parts = self.joint(x).split(self.widths, dim=-1)
            outputs = dict(zip(self.names, parts, strict=True))
            self._computed = x, outputs
        output = outputs.pop(name)
        if not outputs:
            self._computed = None, {}  # no tensor outlives the calls
        return output


class FusedSlice(nn.Module):
    """Stands in the place of one of the layers that a `FusedLinear` fuses."""

    bias = None

    def __init__(self, fused: FusedLinear, name: str, out_features: int):
        super().__init__()
        self.fused, self.name = fused, name
        self.in_features, self.out_features = fused.joint.in_features, out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fused.output(self.name, x)


def fuse_projections(module: nn.Module) -> int:
    """Fuse the frozen linear layers of `GROUPS` wherever they stand side by side; returns how many groups were fused.

    Those with a bias, those that train, those that are offloaded, and those of a kind that cannot be fused stay.
    """
    fused = 0
    for parent in list(module.modules()):
        for names in GROUPS:
            places = [_place(parent, name) for name in names]
            layers = [getattr(*place, None) for place in places]
            joint = _joint_layer(layers)
            if joint is None:
                continue
            slices = FusedLinear(joint, list(names), [layer.out_features for layer in layers]).slices
            for place, fused_slice in zip(places, slices, strict=True):
                setattr(*place, fused_slice)
            fused += 1
    return fused


def _place(parent: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Where the layer of a name is: in its parent, or in a layer around it that adds adapters (peft's)."""
    layer = getattr(parent, name, None)
    return (layer, "base_layer") if isinstance(getattr(layer, "base_layer", None), nn.Module) else (parent, name)


def fused_layers(module: nn.Module) -> Iterator[FusedLinear]:
    """Each `FusedLinear` in a model once, in order."""
    for part in module.modules():
        if isinstance(part, FusedSlice) and part.name == part.fused.names[0]:
            yield part.fused


def _joint_layer(layers: list) -> nn.Module | None:
    """One layer that computes all of `layers`; None: they cannot be fused."""
    kinds = {type(layer) for layer in layers}
    if kinds not in ({nn.Linear}, {LowBitLinear}):
        return None
    if any(layer.bias is not None or layer.weight.requires_grad for layer in layers):
        return None
    if any(layer.weight.is_meta for layer in layers):  # offloaded: accelerate fetches each layer's weights
        return None
    if kinds == {LowBitLinear}:
        return LowBitLinear.concatenate(layers)
    joint = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), bias=False, device="meta")
    joint.weight = nn.Parameter(torch.cat([layer.weight.data for layer in layers]), requires_grad=False)
    return joint
