"""Every key of the YAML files, with its type, default and meaning.

`common/config.py` checks a user's file against these classes; a key that is not here is an error with a suggestion.
`setting` adds bounds, choices and the keys of a mapping.
*Inert* keys had a meaning in the first release and have none now; they are accepted, so that its files load unchanged.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from minigpt4.common.settings import setting

BLIP2_URL = (
    "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/blip2_pretrained_flant5xxl.pth"
)


@dataclass
class VitSizes:
    """`model.vit_model` as a mapping: sizes of the vision encoder. All of them are required."""

    embed_dim: int = setting(1408, at_least=1)
    depth: int = setting(39, at_least=1)
    num_heads: int = setting(16, at_least=1)
    mlp_ratio: float = setting(4.3637, more_than=0)
    patch_size: int = setting(14, at_least=1)


@dataclass
class QFormerSizes:
    """`model.qformer`. The defaults are the sizes of bert-base."""

    hidden_size: int = setting(768, at_least=1)
    num_hidden_layers: int = setting(12, at_least=1)
    num_attention_heads: int = setting(12, at_least=1)
    intermediate_size: int = setting(3072, at_least=1)
    cross_attention_freq: int = setting(2, at_least=1)
    hidden_dropout_prob: float = setting(0.1, at_least=0, less_than=1)
    attention_probs_dropout_prob: float = setting(0.1, at_least=0, less_than=1)


VIT_KEYS = tuple(size.name for size in fields(VitSizes))

# Vision encoders by name. `eva_clip_g` is the published 1B encoder; the first 39 of its 40 blocks are used.
VIT_MODELS = {
    "eva_clip_g": {"patch_size": 14, "embed_dim": 1408, "depth": 39, "num_heads": 16, "mlp_ratio": 4.3637},
    "eva_tiny": {"patch_size": 8, "embed_dim": 256, "depth": 6, "num_heads": 4, "mlp_ratio": 3.0},
}


@dataclass
class RunConfig:
    """The `run:` section."""

    task: str = "image_text_pretrain"
    """Registered name of the task."""
    runner: str = "runner_base"
    """Registered name of the runner."""
    imports: list[str] = field(default_factory=list)
    """Modules to import first, so that plug-ins can register themselves. `--import` adds to them."""
    name: str = ""
    """Name of the run for trackers, plots and the report; empty: its job id and six random digits."""
    trackers: list[str] = field(default_factory=list)
    """Registered names of the trackers that get the metrics: `tensorboard`, `wandb`, `trackio`, or a plug-in's."""
    report: bool = True
    """Write report.html into the run's folder at its end."""

    lr_sched: str = "linear_warmup_cosine_lr"
    """Registered name of the learning-rate schedule."""
    init_lr: float = setting(1e-4, at_least=0)
    """Learning rate at the end of the warm-up."""
    min_lr: float = setting(8e-5, at_least=0, at_most="init_lr")
    """Learning rate at the end of the run."""
    warmup_lr: float = setting(-1.0)
    """Learning rate at the first step; negative: `init_lr`."""
    warmup_steps: int = setting(0, at_least=0)
    """Steps of linear warm-up, counted from 0 in each epoch."""
    lr_decay_rate: float = setting(1.0, more_than=0)
    """Factor per epoch of `linear_warmup_step_lr`."""
    weight_decay: float = setting(0.05, at_least=0)
    """AdamW's weight decay, on weight matrices only."""
    beta2: float = setting(0.999, at_least=0, less_than=1)
    """AdamW's second beta."""

    max_epoch: int = setting(1, at_least=1)
    """Epochs; each is `iters_per_epoch` micro-batches and ends with a checkpoint."""
    iters_per_epoch: int | None = setting(None, at_least=1)
    """Micro-batches per epoch and rank; null: once through the data, which a stream of shards does not allow."""
    accum_grad_iters: int = setting(1, at_least=1)
    """Micro-batches per optimiser step. N of them equal one batch N times as large."""
    batch_size_train: int = setting(16, at_least=1)
    """Samples per rank and micro-batch."""
    batch_size_eval: int = setting(2, at_least=1)
    """Samples per rank and batch in validation and test."""
    num_workers: int = setting(4, at_least=0)
    """Data-loading processes per rank."""
    data_timeout_s: float = setting(300.0, at_least=0)
    """Seconds to wait for shards and pictures that are out of reach, before they are left out."""
    log_freq: int = setting(50, at_least=1)
    """Micro-batches between two log lines."""
    seed: int = setting(42, at_least=0, at_most=2**32 - 1)
    """Seed of python, numpy and torch (plus the rank), and of the data order."""

    train_splits: list[str] = field(default_factory=lambda: ["train"])
    """Splits to train on."""
    valid_splits: list[str] = field(default_factory=list)
    """Splits to validate on after each epoch; the best checkpoint is kept as checkpoint_best.pth."""
    test_splits: list[str] = field(default_factory=list)
    """Splits to evaluate after training, or alone with `evaluate`."""
    evaluate: bool = False
    """Evaluate `test_splits` and do not train."""
    eval_task: str | None = None
    """With `evaluate`: score answers, too, by this evaluation task; `auto`: the one that fits the references."""

    output_dir: str = setting("output", kind="path")
    """Folder of the runs, relative to the working directory. Each run makes a folder of its own in it."""
    resume_ckpt_path: str | None = setting(None, kind="path")
    """Checkpoint of an unfinished run to resume: a file, or a run's folder (its newest checkpoint)."""
    resume_anyway: bool = False
    """Resume although settings, data or the number of ranks differ from those of the checkpoint's run."""

    amp: bool = True
    """Mixed precision on a GPU. On a CPU everything is float32."""
    amp_dtype: str = setting("auto", choices=("auto", "bf16", "fp16"))
    """`bf16`, `fp16` (with a loss scaler), or `auto`: bf16 where the GPU has it."""
    packed: bool = True
    """Batches without padding, on a GPU in 16 bit. False: padded to the longest caption."""
    compile: bool = True
    """torch.compile for the layers, and CUDA graphs where batches are packed; on a GPU in 16 bit."""
    fp8: bool = False
    """Compute the frozen linear layers of language model and encoder in 8-bit floating point: faster, but not equal to
    rounding. Needs a Hopper GPU or newer, bfloat16, and a language model in 16 bit."""
    device: str = "cuda"
    """`cuda`, `cuda:N`, `cpu` or `mps` (an Apple GPU). On a machine without an NVIDIA GPU, `cuda` falls back to the CPU
    with a warning. A GPU that torch cannot use is an error."""
    video_backend: str = setting("av", choices=("av", "decord"))
    """Decoder of videos in `chat` and `caption`. `decord` decodes more codecs, but its FFmpeg is of 2020 and has known
    holes, so it is for files of your own only. The page always takes `av`."""
    distributed: bool = True
    """Train together with the other processes that torchrun started; False with several is an error."""

    dist_backend: str | None = None
    """Backend of torch.distributed; null: nccl on GPUs, gloo on CPUs."""
    dist_url: str = "env://"
    """*Inert*: torchrun sets the rendezvous."""
    world_size: int = 1
    """*Inert*: torchrun sets the number of processes."""
    gpu: int | None = None
    """*Inert*: the local rank decides."""
    rank: int | None = None
    """*Inert*: torchrun sets it."""
    use_dist_eval_sampler: bool = True
    """*Inert*: evaluation is always spread over the ranks, each sample once."""


@dataclass
class MiniGPT4Config:
    """The `model:` section with `arch: mini_gpt4`."""

    arch: str = "mini_gpt4"
    """Registered name of the model."""
    model_type: str = "pretrain_vicuna"
    """Which default YAML of the model to start from: `pretrain_vicuna` or `tiny`."""

    image_size: int = setting(224, at_least=1)
    """Side of the square input image, in pixels."""
    vit_model: Any = setting("eva_clip_g", keys=VitSizes, kind="name")
    """`eva_clip_g`, `eva_tiny`, or a mapping {embed_dim, depth, num_heads, mlp_ratio, patch_size}."""
    vit_weights: str | None = setting("published", kind="path")
    """The encoder's weights: a file, a URL, or a BLIP-2's folder in Hugging Face format; `published`: those of the
    named encoder; null: random."""
    vit_precision: str = setting("fp16", choices=("fp16", "fp32"))
    """`fp16`: the run's 16-bit type on a GPU, float32 on a CPU. `fp32`: float32 everywhere."""
    freeze_vit: bool = True
    """Do not train the encoder and ln_vision."""
    drop_path_rate: float = setting(0.0, at_least=0, less_than=1)
    """Stochastic depth of an encoder that is trained."""
    use_grad_checkpoint: bool = False
    """Recompute the encoder's activations in the backward pass, for an encoder that is trained."""

    q_former_model: str | None = setting(BLIP2_URL, kind="path")
    """Weights of the Q-Former, its queries and ln_vision: a file, a URL, or a BLIP-2's folder; null: random."""
    qformer: dict[str, Any] = setting(dict, keys=QFormerSizes)
    """Sizes that differ from bert-base."""
    num_query_token: int = setting(32, at_least=1)
    """Vectors per image."""
    freeze_qformer: bool = True
    """Do not train the Q-Former and its queries."""

    load_vision: bool = True
    """Build encoder and Q-Former. `train.py` leaves them out if every dataset is cached features."""

    llama_model: str = setting("/path/to/vicuna/weights/", kind="path")
    """The language model: a folder in Hugging Face format, a hub id, or a .gguf file."""
    low_resource: bool = False
    """Load the language model in 8 bit."""
    load_in: str | None = setting(None, choices=("16bit", "8bit", "8bit_weights", "4bit"))
    """`16bit`, `8bit`, `4bit`, or `8bit_weights` (8 bit without bitsandbytes); overrides `low_resource`."""
    llm_grad_checkpoint: int = setting(0, at_least=0)
    """Number of the language model's layers, from the first, that recompute their activations in the backward pass."""
    llm_device_map: str | None = setting(None, choices=("auto",))
    """`auto` spreads a language model that does not fit on one GPU over several, for chat; null: the rank's GPU."""
    trust_remote_code: bool = False
    """Run the Python files that come with a language model, for models that transformers has no code of its own for.
    They can do whatever you can: read them first."""
    device_8bit: int | None = None
    """*Inert*: the quantised model is on the rank's own device."""

    allow_llm_mismatch: bool = False
    """Accept a checkpoint that was trained with another language model of the same width."""

    ckpt: str | None = setting(None, kind="path")
    """MiniGPT-4 weights to start from: a file, or a run's folder (its newest checkpoint)."""
    prompt: str | None = ""
    """*Inert*, as in the first release; prompts come from `prompt_path`."""
    prompt_path: str | None = setting(None, kind="path")
    """Text file with one prompt a line; lines without <ImageHere> are ignored."""
    template: Any = None
    """The text around messages: `vicuna_v0`, `vicuna_v1`, `llama2`, `auto` (the tokenizer's own chat template), or a
    mapping of start, system, question, next_question, end. null: `prompt_template` and `end_sym`, which it replaces."""
    prompt_template: str = "{}"
    """Text around a prompt; `{}` stands for the prompt."""
    learn_on: str = setting("answers", choices=("answers", "all"))
    """What is learnt of a conversation: `answers` with their ends, or `all` texts after the first question, that is,
    later questions too."""
    max_txt_len: int = setting(32, at_least=1)
    """Most tokens of a caption, end_sym included; the rest is cut off."""
    end_sym: str = "\n"
    """Text that ends a caption; it is learnt with the caption."""

    @classmethod
    def from_section(cls, section: Mapping[str, Any]) -> "MiniGPT4Config":
        """The settings of a `model:` section, without the keys that a plug-in adds."""
        known = {key.name for key in fields(cls)}
        return cls(**{key: value for key, value in section.items() if key in known})


@dataclass
class DatasetConfig:
    """A section `datasets.<name>`."""

    data_type: str = "images"
    """*Inert*: the builder determines the kind of data."""
    builder: str = ""
    """Registered name of the builder, such as `conversation`; empty: the name of the dataset."""
    type: str = "default"
    """Which default YAML of a plug-in's dataset to start from."""
    build_info: dict[str, Any] = field(default_factory=dict)
    """`storage`: the shards (brace range, tar, list, glob, URL, pipe:) or the folder. `features`: a cache to train from
    instead, made by `python -m minigpt4 cache-features`. `val`: the share of the records that are in the split "val"
    (0.02), or files like `storage`."""
    vis_processor: dict[str, Any] = field(default_factory=dict)
    """Image processor per split: {train: {name, image_size, …}, eval: {…}}."""
    text_processor: dict[str, Any] = field(default_factory=dict)
    """Text processor per split: {train: {name, …}, eval: {…}}."""
    sample_ratio: float = setting(1.0, at_least=0)
    """Relative frequency of this dataset: each batch comes from one dataset, drawn by these numbers."""


@dataclass
class Processors:
    """`vis_processor` and `text_processor`: a processor for each split, with its name and its arguments."""

    train: dict[str, Any] | None = None
    eval: dict[str, Any] | None = None


@dataclass
class BuildInfo:
    """`build_info` of the datasets that come with the package."""

    storage: Any = setting(None, kind="texts")
    features: str | None = setting(None, kind="path")
    val: Any = None


@dataclass
class ShippedDatasetConfig(DatasetConfig):
    """A section `datasets.<name>` of a dataset of the package. A plug-in's may have other keys below these."""

    build_info: dict[str, Any] = setting(dict, keys=BuildInfo)
    vis_processor: dict[str, Any] = setting(dict, keys=Processors)
    text_processor: dict[str, Any] = setting(dict, keys=Processors)


@dataclass
class PreprocessConfig:
    """The `preprocess:` section: processors of datasets that name none."""

    vis_processor: dict[str, Any] = setting(dict, keys=Processors)
    text_processor: dict[str, Any] = setting(dict, keys=Processors)


@dataclass
class EnvConfig:
    """The `env:` section."""

    cache_root: str | None = setting(None, kind="path")
    """*Inert*: published weights are cached under TORCH_HOME, those of the language model under HF_HOME."""
