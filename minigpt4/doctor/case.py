"""What the checks look at: a config, and what its files say, each read once."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from minigpt4.common import facts
from minigpt4.common.config import Config
from minigpt4.common.schema import VIT_KEYS, VIT_MODELS, MiniGPT4Config
from minigpt4.doctor.headers import HeaderError, Tensor, read_header, tensors_of
from minigpt4.doctor.machine import Gpu
from minigpt4.weights import locate

# Sizes of bert-base, which `model.qformer` changes; those of `QFormer`'s signature.
QFORMER = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "cross_attention_freq": 2,
}
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")


@dataclass(frozen=True)
class LanguageModel:
    """What the folder of a language model says of itself."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    """Of all shards that can be looked into; empty for a format that cannot."""

    @property
    def width(self) -> int | None:
        return self._first("word_embed_proj_dim", "hidden_size", "n_embd", "d_model")

    @property
    def layers(self) -> int | None:
        return self._first("num_hidden_layers", "n_layer", "num_layers")

    @property
    def ffn(self) -> int:
        return self._first("intermediate_size", "ffn_dim", "n_inner") or 4 * (self.width or 0)

    @property
    def kv_width(self) -> int:
        """Numbers per token and layer in the cache of keys, and as many in that of values."""
        heads = self._first("num_attention_heads", "n_head") or 1
        head = self._first("head_dim") or (self.width or 0) // heads
        return head * (self._first("num_key_value_heads") or heads)

    @property
    def embedding(self) -> Tensor | None:
        return next((tensor for name, tensor in self.tensors.items() if name.endswith(EMBEDDINGS)), None)

    @property
    def vocabulary(self) -> int | None:
        """Rows of the token embeddings."""
        return self.embedding.shape[0] if self.embedding else self._first("vocab_size")

    def parameters(self) -> tuple[int, int]:
        """How many are in matrices that 8 and 4 bit shrink, and how many are not."""
        small = large = 0
        for name, tensor in self.tensors.items():
            if name.endswith("inv_freq"):
                continue
            kept = len(tensor.shape) < 2 or name.endswith((*EMBEDDINGS, "lm_head.weight", "embed_positions.weight"))
            small, large = (small, large + prod(tensor.shape)) if kept else (small + prod(tensor.shape), large)
        return small, large

    def _first(self, *keys: str) -> int | None:
        return next((self.config[key] for key in keys if self.config.get(key) is not None), None)


@dataclass
class RunContext:
    """A config on a machine. Files that cannot be read give None here; the checks of files say why."""

    cfg: Config
    training: bool = True
    gpus: list[Gpu] = field(default_factory=list)
    world_size: int = 1
    """Processes of the run, and those of them on this machine: all, where it is not said."""
    processes_here: int | None = None
    step_time: float | None = None

    @property
    def model(self):
        return self.cfg.model_cfg

    @property
    def run(self):
        return self.cfg.run_cfg

    @property
    def is_ours(self) -> bool:
        """Whether the model is MiniGPT4, whose keys the checks know."""
        return self.model.get("arch") == MiniGPT4Config.arch

    @property
    def local_size(self) -> int:
        return self.processes_here or self.world_size

    @property
    def on_gpu(self) -> bool:
        return self.run.device.startswith("cuda") and bool(self.gpus)

    def features(self, name: str) -> str | None:
        """Where a dataset's cached image features are; None: it has pictures."""
        return (self.cfg.datasets_cfg[name].get("build_info") or {}).get("features")

    @property
    def with_vision(self) -> bool:
        """Whether encoder and Q-Former are loaded: a run from cached features does without them."""
        cached = self.training and self.cfg.datasets_cfg and all(map(self.features, self.cfg.datasets_cfg))
        return self.model.load_vision and not cached

    @property
    def load_in(self) -> str:
        if not self.is_ours:
            return "16bit"
        return self.model.load_in or ("8bit" if self.model.low_resource else "16bit")

    @cached_property
    def vit(self) -> dict[str, float] | None:
        """Sizes of the encoder; None for a name that is not known, and for a mapping of other sizes."""
        kind = self.model.vit_model
        if isinstance(kind, str):
            return VIT_MODELS.get(kind)
        return dict(kind) if set(kind) == set(VIT_KEYS) else None

    @cached_property
    def qformer(self) -> dict[str, int]:
        return QFORMER | dict(self.model.qformer)

    @cached_property
    def sources(self) -> dict[str, str]:
        """{key: path or URL} of the weights files."""
        vit = self.model.vit_weights
        if vit == "published":
            vit = facts.VIT_WEIGHTS.get(self.model.vit_model) if isinstance(self.model.vit_model, str) else None
        found = {"model.ckpt": self.model.ckpt}
        if self.with_vision:
            found |= {"model.vit_weights": vit, "model.q_former_model": self.model.q_former_model}
        if self.run.resume_ckpt_path:
            found["run.resume_ckpt_path"] = self.run.resume_ckpt_path
        return {key: value for key, value in found.items() if value}

    def file(self, key: str) -> Path | None:
        """The local file of a source, if it is there: of a run's folder, its newest checkpoint."""
        value = self.sources.get(key)
        if value is None:
            return None
        path = locate.cached_file(value) if facts.is_url(value) else Path(value).expanduser()
        if path.is_dir():
            numbered = {int(p.stem.split("_")[1]): p for p in path.glob("checkpoint_*.pth") if p.stem[11:].isdigit()}
            return numbered[max(numbered)] if numbered else None
        return path if path.is_file() else None

    @cached_property
    def _contents(self) -> dict[str, dict | None]:
        return {}

    def content(self, key: str) -> dict | None:
        """What the file of a source holds."""
        if key not in self._contents:
            path = self.file(key)
            try:
                self._contents[key] = read_header(path) if path else None
            except HeaderError:
                self._contents[key] = None
        return self._contents[key]

    def tensors(self, key: str) -> dict[str, Tensor]:
        """The tensors in the file of a source; none if it cannot be read."""
        return tensors_of(self.content(key) or {})

    @cached_property
    def llm_folder(self) -> Path | None:
        """The folder of the language model: a local one, or that of a hub id in the cache."""
        value = self.model.llama_model
        path = Path(value).expanduser()
        if path.is_dir():
            return path
        if facts.is_hub_id(value):
            from huggingface_hub import try_to_load_from_cache

            config = try_to_load_from_cache(value, "config.json")
            return Path(config).parent if isinstance(config, str) else None
        return None

    @cached_property
    def llm(self) -> LanguageModel | None:
        if self.llm_folder is None:
            return None
        try:
            config = json.loads((self.llm_folder / "config.json").read_text(encoding="utf-8"))
            names = locate.shards(self.llm_folder)
        except (OSError, ValueError):
            return None
        tensors: dict[str, Tensor] = {}
        for name in names:
            try:
                tensors |= tensors_of(read_header(self.llm_folder / name))
            except HeaderError:
                continue
        return LanguageModel(self.llm_folder, config.get("text_config") or config, tensors)
