"""LoRA adapters in a frozen language model, by peft: a layer's W x becomes W x + B A dropout(x) · alpha / r.

The layer itself stays, in 16, 8 or 4 bit, as `base_layer` of peft's layer. A [r,K] and B [N,r] are in float32; B starts
at zero. peft is imported only where adapters are asked for.

K inputs and N outputs of a layer, r rank.
"""

import hashlib
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

import torch
from torch import nn

from minigpt4.common import compat
from minigpt4.common.errors import ConfigError
from minigpt4.common.facts import is_adapter
from minigpt4.common.model_schema import LoraSettings
from minigpt4.common.registry import registry
from minigpt4.common.text import pluralize

MERGED = "minigpt4_merged"
"""In a language model's config.json: the digests of the adapters that were merged into it."""


@registry.register("adapters", "lora")
class LoraAdapters:
    """The adapters of a language model. Making one puts them into the model.

    Args:
        llm: the model, whose targeted layers are exchanged.
        settings: `model.lora`.
        train: whether the adapters train.

    Raises ConfigError if peft is not installed, and for layers and modules that the model lacks.
    """

    def __init__(self, llm: nn.Module, settings: LoraSettings, train: bool = True):
        if find_spec("peft") is None:
            raise ConfigError("model.lora needs a package: pip install peft, or set model.lora=null.")
        targets = target_names(llm, settings)
        compat.silence_bitsandbytes()  # which peft imports
        from peft import LoraConfig, inject_adapter_in_model

        rank = {"r": settings.r, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout}
        inject_adapter_in_model(LoraConfig(target_modules=targets, **rank), llm)
        self.modules = [
            part for layer in adapted_layers(llm) for part in (layer.lora_A, layer.lora_B, layer.lora_dropout)
        ]
        for part in self.modules:
            part.float().requires_grad_(train)
        if settings.dropout:
            _recompute_with_equal_dropout(llm)

    @staticmethod
    def check_not_merged(llm: nn.Module, trained: Mapping[str, torch.Tensor], source: str) -> None:
        """Raise ConfigError if the adapters of the checkpoint `source` are in the weights of the model already."""
        if digest(trained) in getattr(llm.config, MERGED, ()):
            raise ConfigError(
                f"The LoRA adapters of {source} are merged into model.llama_model already. Set model.lora=null, and "
                "model.ckpt to the checkpoint_merged.pth beside these weights; or name the original language model."
            )


def digest(trained: Mapping[str, torch.Tensor]) -> str:
    """Identifies the adapters of a checkpoint."""
    content = hashlib.sha256()
    for name in sorted(filter(is_adapter, trained)):
        content.update(name.encode() + trained[name].float().cpu().numpy().tobytes())
    return content.hexdigest()[:16]


def adapted_layers(llm: nn.Module) -> Iterator[nn.Module]:
    """peft's layers in a model."""
    from peft.tuners.lora import LoraLayer

    return (part for part in llm.modules() if isinstance(part, LoraLayer))


def target_names(llm: nn.Module, settings: LoraSettings) -> list[str]:
    """The full names of the linear layers that get adapters.

    Raises ConfigError for a number of `layers` and a name of `target_modules` that the model lacks, and for a rank `r`
    above that of the layers.
    """
    layers = compat.decoder_layers(llm)
    chosen = range(len(layers)) if settings.layers is None else settings.layers
    if outside := [number for number in chosen if not 0 <= number < len(layers)]:
        raise ConfigError(
            f"model.lora.layers lists {outside[0]}; the language model has {pluralize(len(layers), 'layer')}, numbered "
            "from 0."
        )
    if not chosen or not settings.target_modules:
        raise ConfigError("model.lora has no target_modules or layers. Name some, or set model.lora=null.")
    found = {layers[number] for number in chosen}
    names = [
        f"{prefix}.{name}"
        for prefix, layer in llm.named_modules()
        if layer in found
        for name, part in layer.named_modules()
        if isinstance(part, nn.Linear)
    ]
    known = sorted({name.rpartition(".")[2] for name in names})
    for target in settings.target_modules:
        if target not in known:
            raise ConfigError(
                f"model.lora.target_modules lists {target!r}; the linear layers of the language model are "
                f"{', '.join(known)}."
            )
    names = [name for name in names if name.rpartition(".")[2] in settings.target_modules]
    widest = max(min(part.in_features, part.out_features) for part in map(llm.get_submodule, names))
    if settings.r > widest:
        raise ConfigError(f"model.lora.r={settings.r} must be at most {widest}, the rank of the largest of its layers.")
    return names


def merged_weight(layer: nn.Module) -> torch.Tensor:
    """The weight [N,K] of a layer with its adapters: W + B A · alpha / r in float32, rounded once to the type of W.

    layer: one of `adapted_layers` around a layer that is not quantised.
    """
    weight = layer.get_base_layer().weight
    return (weight.float() + layer.get_delta_weight("default").float()).to(weight.dtype)


def _recompute_with_equal_dropout(llm: nn.Module) -> None:
    """Layers that recompute their activations must drop the same inputs of the adapters both times."""
    layers = compat.decoder_layers(llm)
    for index, layer in enumerate(layers):
        inner = compat.without_recomputation(layer)
        if inner is not layer:
            layers[index] = compat.recomputed(inner, preserve_rng_state=True)
