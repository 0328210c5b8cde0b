"""Contracts with plug-ins: the smallest plug-in of each kind is trained by train.py, and signatures agree with ours."""

import inspect
from collections.abc import Callable

import pytest
import torch
from dataset_files import write_align
from omegaconf import OmegaConf
from torch.utils.data import IterableDataset

from minigpt4.__main__ import main as minigpt4
from minigpt4.common import contracts, dist_utils
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.datasets.builders import BaseDatasetBuilder
from minigpt4.datasets.datasets.cc_sbu_dataset import CCSBUAlignDataset
from minigpt4.datasets.datasets.feature_dataset import FeatureSet, FeatureStream
from minigpt4.datasets.datasets.image_text_stream import ImageTextStream
from minigpt4.datasets.datasets.shard_reader import ShardReader
from minigpt4.datasets.loaders import TrainLoader
from minigpt4.models import BaseModel, MiniGPT4
from minigpt4.models.projectors import MLP
from minigpt4.models.vision import Vision
from minigpt4.processors import BaseProcessor, Blip2ImageEvalProcessor, Blip2ImageTrainProcessor
from minigpt4.runners import RunnerBase
from minigpt4.tasks import BaseTask
from train import main as train

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# --- the smallest plug-ins


class SmallestModel(BaseModel):
    """Inherits everything but its constructor, `from_config` and `forward`."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    @classmethod
    def from_config(cls, cfg):
        return cls()

    def forward(self, samples):
        return {"loss": self.layer(samples["x"]).square().mean()}


class BareModel(torch.nn.Module):
    """Inherits nothing of ours."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, samples):
        (x,) = samples.values()  # as the loader made them, without "prompt_draw"
        return self.layer(x).square().mean()


class BareSet:
    """A dataset with a length and nothing else; the base class of torch is not needed."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"x": torch.tensor([1.0, index])}


class BareStream(IterableDataset):
    def __iter__(self):
        yield from ({"x": torch.tensor([1.0, number])} for number in range(3))


class SmallestBuilder(BaseDatasetBuilder):
    dataset: Callable = BareSet

    def build(self):
        return {"train": self.dataset(), "val": BareSet()}


class BareBuilder:
    """Inherits nothing of ours."""

    def __init__(self, cfg):
        self.cfg = cfg

    @classmethod
    def default_config_path(cls, type="default"):
        return None

    @classmethod
    def from_features(cls, config):
        return False

    def build_datasets(self):
        assert self.name == "smallest" and self.cfg.sample_ratio == 1.0
        return {"train": BareSet()}


class BareTask:
    """Inherits nothing of ours, and has no `config_class`."""

    @classmethod
    def setup_task(cls, cfg):
        return cls()

    def build_datasets(self, cfg):
        return {"smallest": {"train": BareSet(), "val": BareSet()}}

    def build_model(self, cfg):
        return BareModel()

    def train_step(self, model, samples):
        return model(samples)

    def valid_step(self, model, samples):
        return model(samples)

    def agg_metrics(self, loss):
        return -loss


class BareSchedule:
    def __init__(
        self, optimizer, max_epoch, iters_per_epoch, min_lr, init_lr, warmup_steps, warmup_start_lr, decay_rate
    ):
        self.optimizer = optimizer
        self.given = (max_epoch, iters_per_epoch, min_lr, init_lr, warmup_steps, warmup_start_lr, decay_rate)

    def step(self, cur_epoch, cur_step):
        assert self.given == (1, 2, 0.1, 0.2, 3, 0.3, 0.5)
        for group in self.optimizer.param_groups:
            group["lr"] = 1 + cur_epoch + cur_step


class BareProcessor:
    """Inherits nothing of ours."""

    @classmethod
    def from_config(cls, cfg=None):
        assert cfg["name"] == "smallest"
        return cls()

    def __call__(self, item):
        return 2 * item


@pytest.fixture
def run(open_registry, tmp_path, monkeypatch):
    """Runs train.py on plug-ins of the name "smallest": {kind: class}, then keys of `run:`. Returns the checkpoint.

    The run computes in bfloat16, as on a GPU, so that the runner accelerates the model; a CPU can do that too.
    """
    monkeypatch.setattr(dist_utils, "select_dtype", lambda *args: torch.bfloat16)
    folder = tmp_path / "output"

    def train_plugins(plugins=None, sections=None, **run):
        for kind, plugin in ({"model": SmallestModel, "builder": SmallestBuilder} | (plugins or {})).items():
            registry.register(kind, "smallest")(plugin)
        settings = {"device": "cpu", "num_workers": 0, "batch_size_train": 2, "iters_per_epoch": 2, "log_freq": 1}
        content = {
            "run": settings | {"max_epoch": 1, "output_dir": str(folder)} | run,
            "model": {"arch": "smallest", "model_type": "any"},
            "datasets": {"smallest": {}},
        }
        path = tmp_path / "run.yaml"
        OmegaConf.save(content | (sections or {}), path)
        train(["--cfg-path", str(path)])
        (path,) = folder.glob("*/checkpoint_0.pth")
        return torch.load(path, weights_only=True)

    return train_plugins


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_a_model_that_inherits_base_model(run, device):
    assert set(run(device=device)["model"]) == {"layer.weight", "layer.bias"}


@pytest.mark.parametrize(("packed", "compiled"), [(True, False), (False, True)])
def test_the_runner_accelerates_a_model_once(run, packed, compiled):
    calls = []

    class Fast(SmallestModel):
        def accelerate(self, packed, compiled, fp8):
            calls.append((packed, compiled, fp8))

    run({"model": Fast}, packed=packed, compile=compiled)
    assert calls == [(packed, compiled, False)]


def test_base_model_does_not_ignore_fp8():
    with pytest.raises(ConfigError, match="run.fp8"):
        SmallestModel().accelerate(True, True, True)


def test_a_model_gets_device_and_type_if_it_asks_for_them(run):
    given = []

    class Placed(SmallestModel):
        @classmethod
        def from_config(cls, cfg, device, dtype):
            given.append((cfg.arch, device, dtype))
            return cls()

    run({"model": Placed})
    assert given == [("smallest", torch.device("cpu"), torch.bfloat16)]


def test_a_model_prepares_each_batch_and_is_identified_by_its_fingerprint(run):
    class Prepared(SmallestModel):
        fingerprint = {"name": "mine"}

        def prepare(self, samples):
            return {"double": 2 * samples["x"]}

        def forward(self, samples):
            return {"loss": self.layer(samples["double"]).mean(), "num_labels": 2}

    assert run({"model": Prepared})["llm_fingerprint"] == {"name": "mine"}


@pytest.mark.parametrize("task", [BareTask, type("SmallestTask", (BaseTask,), {})])
def test_a_task_without_keys_of_its_own(run, task):
    """A bare one builds a bare model; the validation loss chooses the best checkpoint."""
    content = run({"task": task}, task="smallest", valid_splits=["val"])
    assert -100 < content["best_metric"] < 0


@pytest.mark.parametrize("builder", [BareBuilder, SmallestBuilder])
def test_a_builder_of_a_map_dataset(run, builder):
    assert run({"builder": builder}, iters_per_epoch=None)["epoch"] == 0


def test_a_bare_stream(run):
    run({"builder": type("Streams", (SmallestBuilder,), {"dataset": BareStream})}, iters_per_epoch=5)


@pytest.mark.parametrize("base", [BareSet, BareStream])
def test_optional_methods_of_a_dataset(run, base, caplog):
    caplog.set_level("INFO")
    calls = []

    class Full(base):
        def set_seed(self, seed, rank, world_size):
            calls.append(("set_seed", seed > 0, rank, world_size))

        def set_epoch(self, epoch):
            calls.append(("set_epoch", epoch))

        def take_left_out(self):
            return {("no picture", "0.tar"): 3}

        def text_length(self, index):
            raise AssertionError("only several ranks ask for it")

        def collater(self, samples):
            calls.append(("collater", len(samples)))
            return {"x": torch.stack([sample["x"] for sample in samples])}

    run({"builder": type("Fulls", (SmallestBuilder,), {"dataset": Full})})
    of_streams = [("set_epoch", 0)] if base is BareStream else []
    assert calls == [("set_seed", True, 0, 1), *of_streams, *[("collater", 2)] * 2]
    assert "Epoch 0: smallest: left out 6 × no picture: 0.tar (6)." in caplog.text


def test_ranks_ask_for_the_lengths_of_texts():
    class Lengths(BareSet):
        def text_length(self, index):
            return (5, 1, 1, 1)[index % 4]

    ranks = [TrainLoader({"n": Lengths()}, None, 2, 0, seed=0, rank=rank, world_size=2) for rank in range(2)]
    long_texts = [
        [int((batch["x"][:, 1] % 4 == 0).sum()) for batch in step]
        for step in zip(*(rank.epoch(0, 20) for rank in ranks), strict=True)
    ]
    assert [1, 1] in long_texts and not any(2 in step for step in long_texts)


def test_a_bare_schedule(run):
    keys = {"min_lr": 0.1, "init_lr": 0.2, "warmup_steps": 3, "warmup_lr": 0.3, "lr_decay_rate": 0.5}
    content = run({"lr_scheduler": BareSchedule}, lr_sched="smallest", **keys)
    assert content["optimizer"]["param_groups"][0]["lr"] == 2


def test_a_bare_processor(run):
    seen = []

    class Processed(SmallestBuilder):
        def build(self):
            seen.extend(self.vis_processors[split](split) for split in ("train", "eval"))
            return super().build()

    section = {"vis_processor": {"train": {"name": "smallest"}}}
    run({"processor": BareProcessor, "builder": Processed}, {"datasets": {"smallest": section}})
    assert seen == ["traintrain", "eval"]


def test_an_image_processor_with_pixels(run, tmp_path):
    """The model gets the result of `pixels`, normalised by mean and std."""
    seen = []

    class Pixels(BareProcessor):
        mean, std = torch.full((3,), 0.5), torch.full((3,), 0.25)

        def pixels(self, picture):
            assert picture.dtype == torch.uint8 and len(picture) == 3
            return torch.full((3, 2, 2), 255, dtype=torch.uint8)

    class Looking(SmallestModel):
        def forward(self, samples):
            seen.append(samples["image"])
            return {"loss": self.layer(samples["image"].mean((1, 2, 3))[:, None].expand(-1, 2)).mean()}

    section = {
        "build_info": {"storage": str(write_align(tmp_path / "align"))},
        "vis_processor": {"train": {"name": "smallest"}},
    }
    run({"processor": Pixels, "model": Looking}, {"datasets": {"cc_sbu_align": section}})
    assert torch.equal(torch.stack(seen), torch.full((2, 2, 3, 2, 2), 2.0))


def test_a_runner_that_changes_a_step(run):
    steps = []

    class Counting(RunnerBase):
        def train_step(self, samples, is_update):
            steps.append(is_update)
            return super().train_step(samples, is_update)

    run({"runner": Counting}, runner="smallest", accum_grad_iters=2)
    assert steps == [False, True]


def test_a_bare_runner(open_registry, tmp_path):
    given = []

    class BareRunner:
        def __init__(self, cfg, task, model, datasets, job_id):
            given.extend([cfg.run_cfg.runner, type(task), type(model), list(datasets["smallest"]), type(job_id)])

        def train(self):
            given.append("trained")

    for kind, plugin in (("model", SmallestModel), ("builder", SmallestBuilder), ("runner", BareRunner)):
        registry.register(kind, "smallest")(plugin)
    path = tmp_path / "run.yaml"
    settings = {"runner": "smallest", "device": "cpu", "output_dir": str(tmp_path / "output")}
    OmegaConf.save({"run": settings, "model": {"arch": "smallest"}, "datasets": {"smallest": {}}}, path)
    train(["--cfg-path", str(path)])
    default_task = registry.get_task_class("image_text_pretrain")
    assert given == ["smallest", default_task, SmallestModel, ["train", "val"], str, "trained"]


def test_a_dataset_whose_features_can_be_cached(open_registry, parts, golden_model_keys, tmp_path):
    class Record:
        def __init__(self, number):
            self.key, self.image_id, self.caption = f"k{number}", f"id {number}", f"caption {number}"

    class Parts:
        num_parts = 2

        def part(self, number):
            return map(Record, range(3 * number, 3 * number + 3))

        def load(self, record):
            return None if record.key == "k4" else {"image": torch.ones(3, 28, 28)}

    registry.register("builder", "smallest")(type("PartsBuilder", (SmallestBuilder,), {"dataset": Parts}))
    model = {"vit_weights": str(parts["folder"] / "vit.pth"), "q_former_model": str(parts["folder"] / "blip2.pth")}
    section = {"vis_processor": {"eval": {"name": "blip2_image_eval", "image_size": 28}}}
    path = tmp_path / "run.yaml"
    content = {"model": golden_model_keys | model, "datasets": {"smallest": section}, "run": {"device": "cpu"}}
    OmegaConf.save(content, path)
    assert minigpt4(["cache-features", "--cfg-path", str(path), "--out", str(tmp_path / "out")]) == 0
    cached = FeatureSet(str(tmp_path / "out" / "smallest"))
    assert [sample["text_input"] for sample in cached] == [f"caption {number}" for number in (0, 1, 2, 3, 5)]


# --- the written contracts and ours cannot drift apart

OURS = [
    (contracts.Model, MiniGPT4),
    (contracts.ModelExtras, BaseModel),
    (contracts.ModelExtras, MiniGPT4),
    (contracts.AnsweringModel, MiniGPT4),
    (contracts.ModelClass, BaseModel),
    (contracts.ModelClass, MiniGPT4),
    (contracts.PlacedModelClass, MiniGPT4),
    (contracts.PlacedModelClass, Vision),
    (contracts.Projector, MLP),
    (contracts.Task, BaseTask),
    (contracts.Builder, BaseDatasetBuilder),
    (contracts.MapDataset, CCSBUAlignDataset),
    (contracts.MapDataset, FeatureSet),
    (contracts.MapDatasetExtras, CCSBUAlignDataset),
    (contracts.MapDatasetExtras, FeatureSet),
    (contracts.Stream, ImageTextStream),
    (contracts.Stream, FeatureStream),
    (contracts.StreamExtras, ImageTextStream),
    (contracts.StreamReader, ShardReader),
    (contracts.DatasetExtras, ImageTextStream),
    (contracts.CacheableDataset, CCSBUAlignDataset),
    (contracts.CacheableDataset, ImageTextStream),
    (contracts.Processor, BaseProcessor),
    (contracts.ProcessorExtras, Blip2ImageTrainProcessor),
    (contracts.ProcessorExtras, Blip2ImageEvalProcessor),
    *((contracts.LRScheduler, registry.get_lr_scheduler_class(name)) for name in registry.list_lr_schedulers()),
    (contracts.Runner, RunnerBase),
    *((contracts.EvalTask, registry.get("eval_task", name)) for name in registry.names("eval_task")),
]
PROTOCOLS = [cls for cls in vars(contracts).values() if getattr(cls, "_is_protocol", False) and cls.__doc__]


def methods(protocol) -> dict[str, inspect.Signature]:
    """The methods that a contract defines, without self or cls; properties have no parameters."""
    found = {}
    for name, member in vars(protocol).items():
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if inspect.isfunction(function) and function.__module__ == contracts.__name__:
            found[name] = without_first(function)
    return found


def without_first(function) -> inspect.Signature:
    signature = inspect.signature(function)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def own_signature(cls, name) -> inspect.Signature:
    member = inspect.getattr_static(cls, "forward" if name == "__call__" and hasattr(cls, "forward") else name)
    return without_first(getattr(member, "__func__", getattr(member, "fget", member)))


@pytest.mark.parametrize(("protocol", "cls"), OURS, ids=lambda cls: cls.__name__)
def test_ours_take_the_arguments_of_the_contract(protocol, cls):
    assert methods(protocol)
    for name, promised in methods(protocol).items():
        own = list(own_signature(cls, name).parameters.values())
        for given, taken in zip(promised.parameters.values(), own, strict=False):
            assert given.kind == given.POSITIONAL_ONLY or given.name == taken.name, (name, given, taken)
            assert given.default is given.empty or taken.default is not taken.empty, (name, given, taken)
        assert len(own) >= len(promised.parameters), (name, own)
        assert all(extra.default is not extra.empty for extra in own[len(promised.parameters) :]), (name, own)


def test_every_contract_is_compared_with_ours():
    attributes_only = {contracts.BuilderExtras, contracts.RunnerExtras, contracts.TaskExtras}
    assert len(PROTOCOLS) > 15
    assert {protocol for protocol, _ in OURS} | attributes_only >= set(PROTOCOLS) - {contracts.Protocol}
    assert not any(methods(protocol) for protocol in attributes_only)


def test_every_member_is_explained():
    for protocol in PROTOCOLS:
        for name in methods(protocol):
            member = inspect.getattr_static(protocol, name)
            assert inspect.getdoc(getattr(member, "__func__", member)), (protocol, name)


def test_keys_of_a_task_that_replace_those_of_runs(run):
    class Alone:
        """Not a RunConfig."""

    with pytest.raises(ConfigError, match=r"run\.task: Task\.config_class must be a subclass of RunConfig"):
        run({"task": type("Task", (BaseTask,), {"config_class": Alone})}, task="smallest")


def test_a_runner_refuses_data_before_the_model_is_built(run):
    class Picky(RunnerBase):
        @classmethod
        def check_data(cls, cfg, datasets):
            raise ConfigError(f"no {', '.join(datasets)} for me")

    class Unbuilt(SmallestModel):
        @classmethod
        def from_config(cls, cfg):
            raise AssertionError("is built")

    with pytest.raises(ConfigError, match="no smallest for me"):
        run({"runner": Picky, "model": Unbuilt}, runner="smallest")
