"""The datasets of a run by split, checked before the model is loaded."""

import logging
from collections.abc import Mapping

from torch import nn
from torch.utils.data import IterableDataset

from minigpt4.common import dist_utils
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.datasets.loaders import check_sizes
from minigpt4.datasets.preview import TextReader, describe

# The most time that the samples of a dataset, shown before training, may take.
PREVIEW_SECONDS = 2.0


def check_data(cfg: Config, datasets: Mapping[str, Mapping], world_size: int) -> None:
    """Raise ConfigError for splits that cannot be trained on or evaluated, and for an epoch without a length."""
    run = cfg.run_cfg
    if not isinstance(datasets, Mapping):
        raise ConfigError(f"The task's build_datasets returned {datasets!r}, not a dict of datasets.")
    for name, splits in datasets.items():
        if not isinstance(splits, Mapping):
            raise ConfigError(f"datasets.{name}: its builder returned {splits!r}, not a dict of splits.")
        for split, dataset in splits.items():
            if not isinstance(dataset, IterableDataset) and not hasattr(dataset, "__len__"):
                raise ConfigError(
                    f"datasets.{name}: its split {split!r} is a {type(dataset).__name__} without __len__. Give it one, "
                    "or let a stream inherit torch.utils.data.IterableDataset."
                )
    if run.evaluate and not run.test_splits:
        raise ConfigError("run.evaluate=True needs run.test_splits, the splits to evaluate. For example: [test]")
    for split in (*run.valid_splits, *run.test_splits):
        _check_evaluated(split, split_of(datasets, split))
    if not run.evaluate:
        training, ratios = training_data(cfg, datasets)
        check_sizes(training, list(ratios.values()), run.batch_size_train, world_size)
        batches_per_epoch(cfg, training, world_size)


def split_of(datasets: Mapping[str, Mapping], split: str) -> dict:
    """{dataset name: dataset} of the datasets that have the split. Raises ConfigError if none has it."""
    found = {name: splits[split] for name, splits in datasets.items() if split in splits}
    if not found:
        known = {name: list(splits) for name, splits in datasets.items()}
        raise ConfigError(f"No dataset has the split {split!r}; there are {known}. Change run.*_splits.")
    return found


def training_data(cfg: Config, datasets: Mapping[str, Mapping]) -> tuple[dict, dict[str, float]]:
    """The datasets of all training splits and their sample ratios, by name."""
    training, ratios = {}, {}
    for split in cfg.run_cfg.train_splits:
        for name, dataset in split_of(datasets, split).items():
            key = name if len(cfg.run_cfg.train_splits) == 1 else f"{name}/{split}"
            training[key] = dataset
            ratios[key] = cfg.datasets_cfg[name].sample_ratio if name in cfg.datasets_cfg else 1.0
    return training, ratios


def log_data(cfg: Config, datasets: Mapping[str, Mapping]) -> None:
    """Log the lines of the first release about the training data. Streams have no number of records."""
    for split in cfg.run_cfg.train_splits:
        sizes = [len(each) for each in split_of(datasets, split).values() if not isinstance(each, IterableDataset)]
        if sizes:
            logging.info("Loaded %d records for %s split from the dataset.", sum(sizes), split)
    if all(cfg.origin(f"datasets.{name}.sample_ratio") == "the defaults" for name in datasets):
        logging.info("dataset_ratios not specified, so each dataset has the same share (datasets.<name>.sample_ratio).")
    if not cfg.run_cfg.valid_splits:
        logging.info("No validation splits found.")
    most = dist_utils.own_patience(cfg.run_cfg.data_timeout_s)
    if most < cfg.run_cfg.data_timeout_s:
        logging.info("run.data_timeout_s is %g s here, half of run.timeout_minutes, for which other ranks wait.", most)


def log_samples(cfg: Config, datasets: Mapping[str, Mapping], model: nn.Module) -> None:
    """Log two samples of each training dataset as the model reads them, if it reads texts as `MiniGPT4` does."""
    reader = TextReader.of_model(model)
    for name, dataset in training_data(cfg, datasets)[0].items() if reader else ():
        try:
            logging.info(describe(name, dataset, reader, PREVIEW_SECONDS))
        except Exception as error:  # a sample that cannot be read, which the run leaves out or reports
            logging.info("%s: no sample can be shown: %s", name, error)


def batches_per_epoch(cfg: Config, training: Mapping, world_size: int) -> int:
    """`run.iters_per_epoch`, or the batches of one pass. Raises ConfigError for a stream, which has no end."""
    run = cfg.run_cfg
    if run.iters_per_epoch:
        return run.iters_per_epoch
    streams = [name for name, dataset in training.items() if isinstance(dataset, IterableDataset)]
    if streams:
        raise ConfigError(
            f"{', '.join(streams)}: a stream of shards has no end, so run.iters_per_epoch must say how long an "
            "epoch is. For example: --options run.iters_per_epoch=500"
        )
    return sum(map(len, training.values())) // (run.batch_size_train * world_size)


def _check_evaluated(split: str, datasets: Mapping) -> None:
    for name, dataset in datasets.items():
        if isinstance(dataset, IterableDataset):
            if not hasattr(dataset, "one_pass"):
                raise ConfigError(
                    f"datasets.{name}: the stream of its split {split!r} has no end and no method `one_pass`, so it "
                    "cannot be evaluated. Change run.valid_splits or run.test_splits."
                )
        elif not len(dataset):
            raise ConfigError(f"datasets.{name} has no samples in its split {split!r}, which is to be evaluated.")
