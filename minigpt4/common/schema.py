"""Every key of the YAML files, with its type, default and meaning.

`common/config.py` checks a user's file against these classes; a key that is not here is an error with a suggestion. The
section `model:` is in `common/model_schema.py`.
`setting` adds bounds, choices and the keys of a mapping.
*Inert* keys had a meaning in the first release and have none now; they are accepted, so that its files load unchanged.
"""

from dataclasses import dataclass, field
from typing import Any

# Plug-ins import these from here, too.
from minigpt4.common.model_schema import BLIP2_URL, VIT_KEYS, VIT_MODELS, MiniGPT4Config  # noqa: F401
from minigpt4.common.settings import setting

# The value of `run.resume_ckpt_path` that stands for the newest checkpoint of the run.
AUTO = "auto"


@dataclass
class LrGroup:
    """`run.lr_groups.<part>`: what differs from the keys of `run:` of the same names."""

    init_lr: float | None = setting(None, at_least=0)
    min_lr: float | None = setting(None, at_least=0, at_most="init_lr")
    warmup_steps: int | None = setting(None, at_least=0)
    weight_decay: float | None = setting(None, at_least=0)


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
    lr_groups: Any = setting(None, keys=LrGroup, kind="mappings")
    """Rates of parts that differ from those above: {lora: {init_lr, min_lr, warmup_steps, weight_decay}, qformer: …}.
    The parts are those of `model.train`; for a plug-in's parameters, the first component of their names."""
    beta2: float = setting(0.999, at_least=0, less_than=1)
    """AdamW's second beta."""

    grad_clip: float | None = setting(None, more_than=0)
    """Largest norm of the gradient, over all weights that train; a longer one is scaled down to it. null: any."""
    max_bad_steps: int = setting(10, at_least=1)
    """Updates in a row that may be skipped because loss or gradient is not finite, before the run stops."""

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
    """Seconds to wait for shards and pictures that are out of reach, before they are left out; with several ranks, at
    most half of `timeout_minutes`."""
    log_freq: int = setting(50, at_least=1)
    """Micro-batches between two log lines."""
    seed: int = setting(42, at_least=0, at_most=2**32 - 1)
    """Seed of python, numpy and torch (plus the rank), and of the data order."""

    train_splits: list[str] = field(default_factory=lambda: ["train"])
    """Splits to train on."""
    valid_splits: list[str] = field(default_factory=list)
    """Splits to validate on after each epoch; the best checkpoint is kept as checkpoint_best.pth."""
    eval_every_epochs: int = setting(1, at_least=1)
    """Epochs from one validation to the next; after the last epoch there is always one."""
    eval_every_steps: int | None = setting(None, at_least=1)
    """Steps (updates of the weights) from one validation to the next; there is also one before training. null: only
    after epochs."""
    eval_samples: int | None = setting(None, at_least=1)
    """Samples of each dataset in a validation, the same each time; null: all for the loss, 200 for answers."""
    best_metric: str | None = None
    """Metric that decides on the best checkpoint: `loss`, or one of `eval_task`. null: the first one of `eval_task`, or
    without that the loss."""
    test_splits: list[str] = field(default_factory=list)
    """Splits to evaluate after training, with the best checkpoint, or alone with `evaluate`."""
    evaluate: bool = False
    """Evaluate `test_splits` and do not train."""
    eval_task: str | None = None
    """Score answers, too, by this evaluation task, on `valid_splits` and `test_splits`; `auto`: the one that fits the
    references; null: the loss alone."""

    output_dir: str = setting("output", kind="path")
    """Folder of the runs, relative to the working directory. Each run makes a folder of its own in it."""
    save_every_steps: int | None = setting(None, at_least=1)
    """Steps (updates of the weights) from one checkpoint within an epoch to the next; null: only after epochs."""
    save_every_minutes: float | None = setting(None, more_than=0)
    """Minutes after which a checkpoint is written within an epoch."""
    keep_last: int | None = setting(None, at_least=1)
    """Checkpoints that are kept beside the best one; null: those of all epochs, and the last two within epochs."""
    resume_ckpt_path: str | None = setting(None, kind="path")
    """Checkpoint of an unfinished run to resume: a file, a run's folder (its newest checkpoint), or `auto`: the newest
    of this run in `output_dir`, or a new run if there is none."""
    resume_anyway: bool = False
    """Resume although settings or data differ from those of the checkpoint's run."""

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
    timeout_minutes: float = setting(20.0, more_than=0)
    """Minutes that a process waits for the others, after which it ends with an error."""
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
