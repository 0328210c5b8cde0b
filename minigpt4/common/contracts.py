"""The contracts between the training code and its plug-ins: who calls what, when, and with which arguments.

A plug-in need not inherit anything from here. Inheriting our base classes (`BaseModel`, `BaseTask`, `BaseProcessor`,
`BaseDatasetBuilder`, `RunnerBase`) fulfils each contract, apart from the methods that the base class leaves open.
`tests/common/test_contracts.py` compares these classes with ours and runs the smallest plug-in of each kind.

A class `…Extras` holds optional members. Each is optional by itself; its docstring says what happens without it.
The calls are positional, unless a docstring says otherwise.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NotRequired, Protocol, TypedDict

if TYPE_CHECKING:
    import torch

Samples = dict[str, Any]
"""A batch. The builtin datasets and models use "image" [B,3,H,W], "text_input" (B strings) and "image_id"."""


class LossAndLabels(TypedDict):
    """The result of a step. Other keys are allowed and ignored."""

    loss: "torch.Tensor"
    """A scalar, the mean over the labels of the batch."""
    num_labels: NotRequired[float]
    """The number of labels. Micro-batches and ranks are weighted by it; where it is absent, each counts as 1."""


class Scores(TypedDict):
    """How a model answers the questions of a split. Figures are as in tables: mostly in per cent."""

    task: str
    """Registered name of the evaluation task."""
    data: str
    """Identifies the questions."""
    figures: dict[str, float]
    """The most important one first."""
    better: dict[str, str]
    """Of each figure: "higher", "lower", or empty: neither is better."""
    details: dict[str, float]
    """`figure/group`: the figures of each group, such as a dataset; `flags/kind`: shares of marked answers."""
    answers: str
    """Some of the answers, a line each."""
    pictures: dict[str, Any]
    """PIL images to these answers, by the numbers of their lines."""


class Model(Protocol):
    """A `torch.nn.Module` that the runner trains; at least one parameter must require a gradient.

    The runner moves it to the device, calls `train()` and `eval()`, optimises the parameters that require gradients
    and writes those into checkpoints under their names.
    """

    def __call__(self, samples: Samples) -> "LossAndLabels | torch.Tensor":
        """Compute the loss of a batch on the device. `BaseTask` calls it, under autocast in 16 bit on a GPU."""


class ModelExtras(Protocol):
    """Optional members of a model."""

    fingerprint: dict[str, Any] | None
    """Identifies the language model, in the form of `weights.fingerprint.take` or as any dict that can be compared. The
    runner records it in checkpoints and refuses to resume with another one. If it is absent or None, nothing is
    recorded or compared."""

    def accelerate(self, packed: bool, compiled: bool, fp8: bool = False) -> None:
        """Set up faster training steps that compute the same to rounding (fp8 excepted).

        Called once with (run.packed, run.compile, run.fp8) on each training run that does not compute in float32, after
        a checkpoint was resumed and before the model is wrapped for several ranks.
        If it is absent, the model trains as it is; run.fp8=True is then an error.
        """

    def sanitize(self, samples: Samples) -> Samples:
        """Return the batch without anything in its texts that the model would take for a part of the prompt.

        Called once for each batch of training and evaluation, before `prepare`. The key "broken_up", a list of texts
        that were changed, is counted and reported after each epoch of training.
        If it is absent, texts stay as the loader made them.
        """

    def prepare(self, samples: Samples) -> Samples:
        """Return the batch with all host work done, such as tokenisation.

        Called once for each training batch before it is copied to the device. On a GPU with data workers, a thread of
        its own calls it while the step before is computed. Values with a method `to` are then moved to the device, and
        those with `pin_memory` and `record_stream` are copied asynchronously. Evaluation does not call it.

        To draw something at random, use the batch's "prompt_draw", a number from 0 to below 1 that a resumed run
        repeats. In the thread, random states of the process may be set back at any time.

        If `prepare` is absent, batches go to the device as the loader made them.
        """


class AnsweringModel(Protocol):
    """The members that chat, `caption`, `evaluate`, `serve` and demo.py use; training does not.

    `MiniGPT4` has them all.
    """

    tokenizer: Any
    """Encodes text and image slots, as `models.tokenizer` does."""
    llama_model: Any
    """A causal language model of transformers, which continues the embeddings of `context`."""
    prompt_list: list[str]
    """Prompts with an image slot; `caption` uses the first. Empty, or absent: the image alone."""
    query_tokens: "torch.Tensor"
    """[1,Q,W]; Q is the number of vectors that stand for an image."""

    def encode_img(self, image: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """Return vectors [B,Q,D] in the language model's space for images [B,3,H,W], and a mask [B,Q] of ones."""

    def context(self, prompts: list[str], image_embeds: "list[torch.Tensor]") -> "tuple[torch.Tensor, torch.Tensor]":
        """Return embeddings [B,S,D] of prompts with one [1,Q,D] for each image slot, and their mask [B,S]."""

    def generate(
        self,
        images: "torch.Tensor | None",
        prompts: list[str],
        stop: str | None = None,
        decoding_loop: Any = None,
        **options: Any,
    ) -> list[str]:
        """Return the continuations of prompts. Only `caption` calls it, with the keyword `decoding_loop`.

        decoding_loop: see `models.generation.continue_embeds`. A model that decodes in its own way may ignore it.
        """


class ModelClass(Protocol):
    """A class registered for `model.arch`. `BaseModel` has all members; a subclass implements `from_config`."""

    PRETRAINED_MODEL_CONFIG_DICT: dict[str, str]
    """{model_type: default YAML, absolute or relative to the package}; empty: there is no default YAML."""
    config_class: type | None
    """Dataclass of the keys of `model:`. None, or absent: any key is accepted."""

    @classmethod
    def default_config_path(cls, model_type: str) -> Any:
        """Return the path of the default YAML. Called only if PRETRAINED_MODEL_CONFIG_DICT is not empty."""

    @classmethod
    def build(cls, cfg: Mapping, device: "torch.device", dtype: "torch.dtype") -> Any:
        """Return the model on `device`. Training, chat and endpoint call it; `BaseModel.build` calls `from_config`."""

    @classmethod
    def from_config(cls, cfg: Mapping) -> Any:
        """Build the model from the checked `model:` section; `BaseModel.build` then moves it to the device.

        A class whose `from_config` has a parameter `dtype` gets the keywords `device` and `dtype` as well (see
        `PlacedModelClass`) and puts the model there itself.
        """


class PlacedModelClass(Protocol):
    """The other form of `from_config`, for models that place their weights themselves."""

    @classmethod
    def from_config(cls, cfg: Mapping, device: "torch.device", dtype: "torch.dtype") -> Any:
        """Build the model on `device`, frozen parts in `dtype`; both are passed as keywords."""


class Projector(Protocol):
    """A class registered for `model.projector`: a `torch.nn.Module` between Q-Former and language model.

    Checkpoints have its parameters as `llama_proj.*`.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        """Called with the widths of the Q-Former and of the language model, on the model's device."""

    def __call__(self, features: "torch.Tensor", /) -> "torch.Tensor":
        """Map features [...,W] float32 to [...,D]; W and D are the two widths. Called under autocast in 16 bit."""


class Task(Protocol):
    """Builds datasets and model, and takes one step. An instance is made once per process by `setup_task`."""

    @classmethod
    def setup_task(cls, cfg: Any) -> Any:
        """Return the task of a `Config`. Called first, as `setup_task(cfg=cfg)`."""

    def build_datasets(self, cfg: Any) -> dict[str, dict[str, Any]]:
        """Return {dataset name: {split: dataset}}. Called once, before `build_model`."""

    def build_model(self, cfg: Any) -> Any:
        """Return the model on the device of the run. Called once, after `build_datasets`."""

    def train_step(self, model: Any, samples: Samples) -> "LossAndLabels | torch.Tensor":
        """Return the loss of a micro-batch on the device, with gradient.

        Called in train mode under autocast. `model` is wrapped in DistributedDataParallel if there are several ranks.
        """

    def valid_step(self, model: Any, samples: Samples) -> "LossAndLabels | torch.Tensor":
        """Return the loss of a batch on the device. Called in eval mode without gradients; `model` is not wrapped."""

    def agg_metrics(self, loss: float) -> float:
        """Return the metric that decides on checkpoint_best.pth; higher is better, and it may be negative.

        Called after each epoch, if run.valid_splits is set, with the mean of the losses of these splits.
        """


class TaskExtras(Protocol):
    """Optional members of a task."""

    config_class: type | None
    """Dataclass of the keys of `run:`, a subclass of `RunConfig`. If it is absent or None, `RunConfig` is used."""


class Builder(Protocol):
    """A class registered for a section `datasets.<name>`, called as `Builder(section)`."""

    name: str
    """Set to the name of the section after construction; error messages use it."""

    def __init__(self, cfg: Mapping | None = None) -> None:
        """Called with the merged section: data_type, type, build_info, vis_processor, text_processor, sample_ratio."""

    @classmethod
    def default_config_path(cls, type: str = "default") -> str | None:
        """Return the default YAML of the section's `type`; None: there is none. Called when the config is read."""

    @classmethod
    def from_features(cls, config: Mapping) -> bool:
        """Return whether the section reads cached image features. If all sections do, no vision side is loaded."""

    def build_datasets(self) -> dict[str, Any]:
        """Return {split: dataset}. Called once, after `name` is set."""


class BuilderExtras(Protocol):
    """Optional members of a builder."""

    config_class: type | None
    """Dataclass of the keys of the section. If it is absent or None, any key is accepted."""


class MapDataset(Protocol):
    """A dataset with a length. Training walks it pass after pass, each in another order; ranks share each pass."""

    def __len__(self) -> int:
        """Return the number of samples, at least batch_size_train for each rank. It must not change."""

    def __getitem__(self, index: int) -> Any:
        """Return a sample: a dict, unless a `collater` makes a dict of a list of samples.

        Called in a data worker, with random, numpy and torch seeded for the batch.
        """


class Stream(Protocol):
    """A `torch.utils.data.IterableDataset` (inherit it: that is how a stream is recognised). It needs iters_per_epoch.

    A validation or test split also needs `one_pass`.
    """

    def __iter__(self) -> Iterator[Any]:
        """Return samples. Called in each data worker at the start of each epoch, and again if the samples run out.

        Ranks and workers must read different samples; `torch.utils.data.get_worker_info` tells which worker this is.
        """


class DatasetExtras(Protocol):
    """Optional members of both kinds of dataset."""

    collater: Callable[[list[Any]], Samples]
    """Makes a batch of a list of samples, in the data worker. `collate_fn` is another name for it; `collater` wins.
    If both are absent or None, torch's `default_collate` is used: tensors are stacked, strings become lists."""

    def set_seed(self, seed: int, rank: int, world_size: int) -> None:
        """Set the source of randomness. Called once for each training split, in the main process, before workers start.

        The seed differs from dataset to dataset and is the same on all ranks.
        If it is absent, the dataset is only seeded batch by batch.
        """

    def texts(self) -> Iterator[tuple[str, Any]]:
        """Yield (id, "text_input") of the usable samples, in order, without reading images.

        Called at the start of training on the first rank, which shows two of them; of a stream, on a copy of it.
        If it is absent, samples 0 and 1 are taken by index, and none of a stream.
        """

    def take_left_out(self) -> Mapping[tuple[str, ...], int]:
        """Return {(cause, shard or file): count} of the samples left out in this process since the last call.

        A third element is the verb of the report, if that is not "left out".

        Called after each batch, in the data worker; the runner logs the sums after each epoch of training.
        If it is absent, nothing is reported for this dataset.
        """


class MapDatasetExtras(Protocol):
    """Optional members of a dataset with a length."""

    def text_length(self, index: int) -> int:
        """Return the length of a sample's text, in any unit. Called in the main process, with several ranks only.

        Ranks then get batches of about equal total length. If it is absent, ranks take samples in turn.
        """


class StreamReader(Protocol):
    """An endless iterator over samples, whose order global random generators must not decide."""

    def __next__(self) -> Any:
        """Return the next sample."""

    def position(self) -> Any:
        """Return the position behind the last sample: numbers and texts, in tuples, lists and dicts."""


class StreamExtras(Protocol):
    """Optional members of a stream."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next `__iter__`. Called in each data worker, right before it.

        If it is absent, `__iter__` does not know the epoch; global random generators are seeded for it all the same.
        """

    def reader(self, number: int, position: Any = None) -> "StreamReader":
        """Return what `__iter__` returns in data worker `number`, after a position if one is given.

        Called in place of `__iter__`, perhaps in another worker, and for several numbers in one.
        If it is absent, a run that is resumed within an epoch reads the stream again from the epoch's start, and must
        have the same number of workers.
        """

    def one_pass(self, reader: int, num_readers: int) -> Iterator[Any]:
        """Return each sample once, the same each time. Called in each data worker of each rank for an evaluation.

        They are `num_readers` in all, and number `reader` (from 0) gets its part of the samples.
        If it is absent, the stream cannot be a validation or test split.
        """


class CacheableDataset(Protocol):
    """A dataset whose pictures `cache-features` can read once each. If a member is absent, caching is refused."""

    @property
    def num_parts(self) -> int:
        """The number of parts; each becomes a shard of the cache."""

    def part(self, number: int) -> "Iterator[Any]":
        """Return the records of a part, in order, with the attributes `key`, `image_id` and `caption`, all strings.

        Keys are unique within a part. Pictures are not decoded yet.
        """

    # The parameter has a name of its own in each dataset, so the call is positional.
    def load(self, sample: Any, /) -> Samples | None:
        """Decode a record of `part`: {"image": …} (see `processors.to_sample`), or None to leave it out.

        Called by several threads at a time.
        """


class Processor(Protocol):
    """An image or text processor, registered under the `name` of its YAML section."""

    @classmethod
    def from_config(cls, cfg: Mapping | None = None) -> Any:
        """Build the processor from its section, which holds `name` too. Raise ConfigError for unknown keys."""

    def __call__(self, item: Any, /) -> Any:
        """Process a PIL image of any mode, or a caption. Called in a data worker for each sample."""


class ProcessorExtras(Protocol):
    """Optional members of an image processor: the faster path over uint8 tensors, all three together.

    It is used only if the processor's own class defines `pixels`: a subclass that inherits it may process pictures in
    another way. If it is absent, `__call__` processes the picture.
    """

    mean: "torch.Tensor"
    """[3], subtracted from the values in [0, 1] on the device."""
    std: "torch.Tensor"
    """[3], by which they are then divided."""

    def pixels(self, picture: "torch.Tensor") -> "torch.Tensor":
        """Crop and resize uint8 [3,H,W] to uint8 [3,S,S]."""


class LRScheduler(Protocol):
    """A learning-rate schedule, registered for `run.lr_sched`."""

    def __init__(
        self,
        optimizer: "torch.optim.Optimizer",
        max_epoch: int,
        iters_per_epoch: int,
        min_lr: float,
        init_lr: float,
        warmup_steps: int = 0,
        warmup_start_lr: float = -1,
        decay_rate: float = 1,
    ) -> None:
        """Called once; the last three arguments are keywords. A negative warmup_start_lr stands for init_lr.

        With `run.lr_groups`, once for each part that they name and once for the others; then `optimizer` has nothing
        but `param_groups`.
        """

    def step(self, cur_epoch: int, cur_step: int) -> Any:
        """Set "lr" in each of `optimizer.param_groups`. The result is not used.

        Called with keywords before each micro-batch; cur_step counts micro-batches from 0 within the epoch.
        """


class Runner(Protocol):
    """A training loop, registered for `run.runner`.

    `minigpt4 bench train --cfg-path` times single steps and uses more of `RunnerBase`; inherit that to be timed.
    """

    def __init__(self, cfg: Any, task: Task, model: Any, datasets: Mapping[str, Mapping[str, Any]], job_id: str):
        """Called once with the results of `build_model` and `build_datasets`; job_id names the folder of the run."""

    def train(self) -> None:
        """Train and evaluate as the config says. Called once."""


class RunnerExtras(Protocol):
    """Optional members of a runner."""

    last_checkpoint: Any
    """The newest checkpoint of the run. train.py names it when the run is stopped by a signal; None, or absent: it
    says that there is none."""
    check_data: Callable[[Any, Mapping[str, Mapping[str, Any]]], None]
    """A class method that raises ConfigError for datasets which the runner could not use. train.py calls it as
    `check_data(cfg, datasets)` before the model is built. If it is absent, the constructor finds out."""


class EvalTask(Protocol):
    """An evaluation task, registered with `registry.register("eval_task", name)` and called without arguments."""

    def measure(self, examples: Sequence[Any], answers: Sequence[Any]) -> Mapping[str, Any]:
        """Return figures by name, the most important one first.

        A figure is an `evaluation.Figure`, such as `evaluation.mean` of one number for each answer. `examples` and
        `answers` are `evaluation.Example` and `evaluation.Answer`, of the same length, at least one.
        """
