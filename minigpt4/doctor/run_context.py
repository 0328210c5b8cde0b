"""A config on a machine: the checks read it, and the files it names, through this. Each file is read once.

torch and the loaders are imported only by the members after `llm_folder`, which read tensors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4.common import facts
from minigpt4.common.config import Config
from minigpt4.common.registry import registry
from minigpt4.common.schema import AUTO, MiniGPT4Config
from minigpt4.common.trained_parts import TrainedParts
from minigpt4.doctor.machine import Gpu
from minigpt4.weights import gguf, locate

if TYPE_CHECKING:
    import torch

# Keys of MiniGPT-4's own checkpoints: a file, or a run's folder.
CHECKPOINT_KEYS = ("model.ckpt", "run.resume_ckpt_path")
# One of these is in the folder of a language model.
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "vocab.json")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
# The ends of the names of matrices that stay in 16 bit when the language model is loaded in 8 or 4 bit.
NOT_QUANTIZED = (*EMBEDDINGS, "lm_head.weight", "embed_positions.weight")


@dataclass(frozen=True)
class LanguageModel:
    """Sizes of a language model."""

    config: Any
    """transformers' config of the decoder."""
    width: int
    """Width of the token embeddings."""
    tensors: dict[str, "torch.Tensor"]
    """All weights, mapped from the disk; of a .gguf file, only their shapes."""
    embedding: "torch.Tensor | GgufEmbedding | None"
    """The token embeddings [V,D]."""

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def ffn(self) -> int:
        """Width of the feed-forward layers."""
        names = ("intermediate_size", "ffn_dim", "n_inner")
        sizes = [getattr(self.config, name, None) for name in names]
        return next((size for size in sizes if size), 4 * self.width)

    @property
    def kv_width(self) -> int:
        """Numbers per token and layer in the cache of keys. The cache of values has as many."""
        heads = self.config.num_attention_heads
        head_dim = getattr(self.config, "head_dim", None) or self.width // heads
        return head_dim * (getattr(self.config, "num_key_value_heads", None) or heads)

    @property
    def vocabulary(self) -> int:
        """Rows of the token embeddings."""
        return self.config.vocab_size if self.embedding is None else len(self.embedding)

    def parameter_counts(self) -> tuple[int, int]:
        """Parameters in matrices that 8 and 4 bit shrink, and all others."""
        matrices = {n: t for n, t in self.tensors.items() if t.ndim >= 2 and not n.endswith(NOT_QUANTIZED)}
        quantizable = sum(tensor.numel() for tensor in matrices.values())
        return quantizable, sum(tensor.numel() for tensor in self.tensors.values()) - quantizable


class GgufEmbedding:
    """The token embeddings [V,D] of a .gguf file. Rows are read when they are asked for."""

    def __init__(self, header: gguf.Header):
        self.header, self.shape = header, header.tensors[gguf.EMBEDDING].shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: list[int]) -> "torch.Tensor":
        import torch

        return torch.from_numpy(gguf.read_tensor(self.header, gguf.EMBEDDING, rows))


@dataclass
class RunContext:
    """A config on a machine."""

    cfg: Config
    training: bool = True
    gpus: list[Gpu] = field(default_factory=list)
    world_size: int = 1
    """Processes of the run."""
    processes_here: int | None = None
    """Processes of the run on this machine. None: all of them."""
    step_time: float | None = None
    """Seconds that a batch takes."""

    def __post_init__(self) -> None:
        self.model, self.run = self.cfg.model_cfg, self.cfg.run_cfg
        self._splits: dict[str, Mapping[str, Any]] = {}  # of the datasets built so far

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
        """The folder of a dataset's cached image features. None: the dataset has pictures."""
        return facts.cached_features(self.cfg.datasets_cfg[name])

    def training_dataset(self, name: str) -> Any:
        """A dataset's first split that is trained on. It is built once. Raises what its builder raises."""
        if name not in self._splits:
            builder = self.cfg.builder_class(name)(self.cfg.datasets_cfg[name])
            builder.name = name
            self._splits[name] = builder.build_datasets()
        return next(dataset for split, dataset in self._splits[name].items() if split in self.run.train_splits)

    @property
    def with_vision(self) -> bool:
        """Whether encoder and Q-Former are loaded."""
        names = self.cfg.datasets_cfg if self.training else []
        return facts.loads_vision(self.model, [bool(self.features(name)) for name in names])

    @property
    def load_in(self) -> str:
        return facts.load_in(self.model.load_in, self.model.low_resource) if self.is_ours else "16bit"

    @property
    def vit(self) -> Mapping[str, float]:
        """Sizes of the encoder. Raises ConfigError if `model.vit_model` is not known."""
        return facts.vit_sizes(self.model.vit_model)

    @cached_property
    def trained_parts(self) -> TrainedParts:
        """The parts that train. Raises ConfigError for settings that contradict each other."""
        return TrainedParts(self.model)

    @cached_property
    def adapted_shapes(self) -> list[tuple[str, int, int]]:
        """Name, outputs and inputs of each matrix of the language model that gets LoRA adapters."""
        settings = self.trained_parts.lora
        if settings is None or self.llm is None:
            return []
        found = []
        for name, tensor in self.llm.tensors.items():
            *path, module, _ = ["", *name.split(".")]
            layer = next((int(step) for step in path if step.isdecimal()), None)
            chosen = layer is not None and (settings.layers is None or layer in settings.layers)
            if chosen and name.endswith(".weight") and module in settings.target_modules:
                found.append((name, *tensor.shape))
        return found

    @cached_property
    def sources(self) -> dict[str, str]:
        """{key: path or URL} of the weights of the vision side and of checkpoints.

        Raises ConfigError if `model.vit_model` and `model.vit_weights` do not say which.
        """
        found, resumed = {"model.ckpt": self.model.ckpt}, self.run.resume_ckpt_path
        if resumed and resumed != AUTO and not Path(resumed).expanduser().is_dir():
            found["run.resume_ckpt_path"] = resumed  # else the newest that can be read, which `check_resume` finds
        if self.with_vision and self.vit:
            found["model.vit_weights"] = facts.vit_weights(self.model.vit_model, self.model.vit_weights)
            found["model.q_former_model"] = self.model.q_former_model
        return {key: value for key, value in found.items() if value}

    def is_here(self, key: str) -> bool:
        """Whether the weights of a source need not be fetched."""
        return not facts.is_url(self.sources[key]) or locate.local_path(self.sources[key]).exists()

    @cached_property
    def llm_folder(self) -> Path | None:
        """The folder of the language model: a local one, or that of a hub id in the cache, if it is whole."""
        value = self.model.llama_model
        path = Path(value).expanduser()
        if path.is_dir():
            return path
        if facts.is_hub_id(value):
            from huggingface_hub import try_to_load_from_cache

            config = try_to_load_from_cache(value, "config.json")
            folder = Path(config).parent if isinstance(config, str) else path
            return folder if locate.shards(folder) and not locate.missing_shards(folder) else None
        return None

    @cached_property
    def llm_source(self) -> str | None:
        """The folder or .gguf file of the language model on this machine. None: there is neither."""
        if self.llm_folder:
            return str(self.llm_folder)
        path = Path(self.model.llama_model).expanduser()
        return str(path) if facts.is_gguf(path.name) and path.is_file() else None

    @property
    def weights_paths(self) -> dict[str, Path]:
        """{key: file or folder} of the weights on this machine."""
        paths = {key: locate.local_path(value) for key, value in self.sources.items()}
        if self.llm_folder:
            paths["model.llama_model"] = self.llm_folder
        return {key: path for key, path in paths.items() if path.exists()}

    def content(self, key: str) -> dict | None:
        """Everything in the file of a source, its tensors mapped from the disk. None: it is not here.

        Of a run's folder, the newest checkpoint; of an encoder's or Q-Former's folder, the tensors of all its files.

        Raises CheckpointError for a file or folder that holds no weights, and FileNotFoundError.
        """
        from minigpt4.weights import checkpoint

        if key not in self.sources or not self.is_here(key):
            return None
        value = self.sources[key]
        path = checkpoint.resolve(value) if key in CHECKPOINT_KEYS else locate.fetch(value)
        return checkpoint.read_weights(path) if path.is_dir() else checkpoint.read_file(path)

    @cached_property
    def local_model_cfg(self) -> MiniGPT4Config:
        """The `model:` section for the loaders. Sources that would be fetched are None."""
        here = {key: value for key, value in self.sources.items() if self.is_here(key)}
        paths = {key: here.get(f"model.{key}") for key in ("vit_weights", "q_former_model", "ckpt")}
        return replace(MiniGPT4Config.from_section(self.model), load_vision=self.with_vision, **paths)

    @cached_property
    def tokenizer(self):
        """The language model's tokenizer. None: it is not on this machine."""
        folder = self.llm_folder
        if self.llm_source is None or (folder and not any((folder / name).is_file() for name in TOKENIZER_FILES)):
            return None
        from minigpt4.models.tokenizer import load_tokenizer

        return load_tokenizer(self.llm_source, self.model.trust_remote_code)

    @cached_property
    def template(self):
        """The template of conversations; None: it is that of a tokenizer which is not on this machine.

        Raises ConfigError for one that cannot be used.
        """
        from minigpt4.models.template import resolve

        if self.model.template == "auto" and self.tokenizer is None:
            return None
        return resolve(replace(self.local_model_cfg, llama_model=self.llm_source or self.model.llama_model))

    @cached_property
    def llm(self) -> LanguageModel | None:
        """The language model's sizes. None: it is not on this machine. Raises what the loaders raise."""
        if self.llm_source is None:
            return None
        import torch

        from minigpt4.models.llm import embedding_dim, read_config
        from minigpt4.weights import checkpoint

        source = self.llm_source, self.model.trust_remote_code
        config, width = read_config(*source), embedding_dim(*source)
        if self.llm_folder:
            tensors = checkpoint.read_weights(self.llm_folder)
            embedding = next((tensor for name, tensor in tensors.items() if name.endswith(EMBEDDINGS)), None)
            return LanguageModel(config, width, tensors, embedding)
        header = gguf.read_header(self.llm_source)
        names = {gguf.EMBEDDING: EMBEDDINGS[0], "output.weight": "lm_head.weight"}
        shapes = {names.get(name, name): tensor.shape for name, tensor in header.tensors.items()}
        tensors = {name: torch.empty(shape, dtype=torch.float16, device="meta") for name, shape in shapes.items()}
        return LanguageModel(config, width, tensors, GgufEmbedding(header))

    @cached_property
    def meta_model(self):
        """The vision side on the meta device, that is, shapes without memory; with `llm`, its projection, too.

        Raises ConfigError for sizes that do not fit.
        """
        import torch

        from minigpt4.models import loading
        from minigpt4.models.vision import Vision

        meta, no_weights = torch.device("meta"), loading.Sources(None, None, None, None)
        parts = loading.vision_parts(self.local_model_cfg, no_weights, meta, torch.float32)
        with meta:
            model = Vision(**parts)
            if self.llm:
                projector = registry.get("projector", self.model.projector)
                model.llama_proj = projector(model.Qformer.hidden_size, self.llm.width)
        return model
