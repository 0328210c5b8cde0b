"""Compute the image features of each picture once, so that training needs neither encoder nor Q-Former.

    python -m minigpt4 cache-features --cfg-path train_configs/minigpt4_stage2_finetune.yaml --out features
    torchrun --nproc_per_node 4 -m minigpt4 cache-features --cfg-path … --out features

Each dataset of the config gets a folder in --out. To train from it, set datasets.<name>.build_info.features to it; see
docs/data.md. The pictures pass vis_processor.eval, so there are no random crops. The language model is not loaded. If a
run is interrupted, the same command continues where it stopped.
"""

import argparse
import logging
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

from omegaconf import OmegaConf
from tqdm import tqdm

from minigpt4.cli.arguments import add_config_arguments
from minigpt4.common.commands import check_positive, command_parser, path_argument
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.common.output import only_run, own_folder
from minigpt4.common.parallel import batches_ahead
from minigpt4.common.registry import registry
from minigpt4.common.text import pluralize


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command_parser("cache-features", __doc__)
    add_config_arguments(parser, "the training run's YAML file")
    parser.add_argument("--out", required=True, type=path_argument, metavar="FOLDER", help="folder for the features")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="pictures at a time (%(default)s)")
    parser.add_argument("--threads", type=int, default=8, metavar="N", help="decoding threads (%(default)s)")
    args = parser.parse_args(argv)
    check_positive(parser, args, ("batch_size", "threads"))
    return args


def main(argv: list[str]) -> int:
    """Cache the features of every dataset of the config. Each rank takes its share of the shards."""
    args = parse_args(argv)
    cfg = Config(args)
    if not cfg.datasets_cfg:
        raise ConfigError(f"{args.cfg_path} has no dataset to cache the features of.")
    cfg.check_paths(datasets=True, keys=("model.vit_weights", "model.q_former_model", "model.ckpt"))

    from minigpt4.common import dist_utils
    from minigpt4.common.logger import setup_logger
    from minigpt4.datasets import feature_cache

    setup_logger()
    for name in cfg.datasets_cfg:
        own_folder(args.out / name, feature_cache.MANIFEST)  # a wrong --out is reported before models are loaded
    with dist_utils.process_group(cfg.run_cfg) as device, dist_utils.entered_by_main(only_run(args.out)):
        sources = {name: (source_dataset(cfg, name), manifest_of(cfg, name)) for name in cfg.datasets_cfg}
        model = load_vision(cfg, device)
        with ThreadPoolExecutor(args.threads) as pool:
            writer = Writer(model, device, pool, args.batch_size)
            for name, (dataset, manifest) in sources.items():
                folder = args.out / name
                writer.write(name, dataset, manifest, folder)
                logging.info("To train from them: --options datasets.%s.build_info.features=%s", name, folder)
    return 0


def source_dataset(cfg, name: str):
    """The dataset of a section, with its eval processor. Raises ConfigError for one that cannot be read in parts."""

    section = cfg.datasets_cfg[name]
    eval_processor = section.vis_processor.get("eval")
    section = OmegaConf.merge(
        section, {"vis_processor": {"train": None}, "build_info": {"features": None, "val": None}}
    )
    section.vis_processor.train = eval_processor
    builder = cfg.builder_class(name)(section)
    builder.name, builder.data_timeout_s = name, cfg.run_cfg.data_timeout_s
    dataset = builder.build_datasets()["train"]
    if not all(hasattr(dataset, method) for method in ("num_parts", "part", "load")):
        raise ConfigError(
            f"datasets.{name}: {type(dataset).__name__} lacks `num_parts`, `part` and `load`, which are needed to read "
            "each picture once. See minigpt4/datasets/datasets/cc_sbu_dataset.py."
        )
    return dataset


def manifest_of(cfg, name: str) -> dict:
    """The record that is kept with a cache: the vision side that computes it, and the data that it is computed from."""
    from minigpt4.tasks.cached_features import made_by

    data = OmegaConf.to_container(cfg.datasets_cfg[name].build_info)
    for key in ("features", "val"):  # the cache holds all samples, whatever share of them is in val
        data.pop(key, None)
    return {"made_by": made_by(cfg, name), "data": data}


def load_vision(cfg, device):
    """The vision side of the config's model. Raises ConfigError if it is not MiniGPT4's."""
    from minigpt4.common import dist_utils
    from minigpt4.models.vision import Vision

    model_class = registry.get_model_class(cfg.model_cfg.arch)
    if getattr(model_class, "query_outputs", None) is not Vision.query_outputs:
        raise ConfigError(
            f"model.arch={cfg.model_cfg.arch} computes its image features in its own way; only those of mini_gpt4 can "
            "be cached."
        )
    dtype = dist_utils.select_dtype(device, cfg.run_cfg.amp, cfg.run_cfg.amp_dtype)
    return Vision.from_config(cfg.model_cfg, device, dtype)


class Writer:
    """Computes features and writes them.

    Args:
        model: a `Vision` on `device`.
        pool: the threads that decode pictures.
    """

    def __init__(self, model, device, pool: Executor, batch_size: int):
        self.model, self.device, self.pool, self.batch_size = model, device, pool, batch_size

    def write(self, name: str, dataset, manifest: dict, folder: Path) -> None:
        """Write this rank's shards of a dataset, except those that exist."""
        from minigpt4.common import dist_utils
        from minigpt4.datasets import feature_cache
        from minigpt4.datasets.loaders import LeftOut, report_left_out

        _, num_query_token, width = self.model.query_tokens.shape
        size = {"shape": [num_query_token, width], "parts": dataset.num_parts}
        if hasattr(dataset, "identity"):
            size[feature_cache.IDENTITIES] = True
        if hasattr(dataset, "digest"):
            size["content"] = dataset.digest()
        feature_cache.open_cache(folder, manifest | size)
        rank, ranks = dist_utils.get_rank(), dist_utils.get_world_size()
        own = {number: feature_cache.shard_path(folder, number) for number in range(rank, dataset.num_parts, ranks)}
        missing = {number: path for number, path in own.items() if not path.exists()}
        written, skipped = 0, []
        for number, path in tqdm(missing.items(), unit="shard", desc=name, disable=rank > 0):
            written += feature_cache.write_shard(path, self._samples(dataset, number, skipped))
        logging.info(
            "%s: %s in %s, %s left out; already there: %s (rank %d).",
            name, pluralize(written, "feature"), pluralize(len(missing), "shard"), pluralize(len(skipped), "picture"),
            pluralize(len(own) - len(missing), "shard"), rank,
        )  # fmt: skip
        left_out = dataset.take_left_out() if hasattr(dataset, "take_left_out") else {}
        for line in report_left_out(Counter({LeftOut(name, *key): count for key, count in left_out.items()})):
            logging.info(line)

    def _samples(self, dataset, number: int, skipped: list[str]) -> Iterator[tuple]:
        """Yield (key, features, record) of a part's pictures, and add the ids of broken ones to `skipped`."""
        samples = dataset.part(number)
        identify = getattr(dataset, "identity", None)
        for batch in batches_ahead(self.pool, lambda s: (s, dataset.load(s)), samples, self.batch_size):
            skipped += [sample.image_id for sample, fields in batch if fields is None]
            good = [(sample, fields) for sample, fields in batch if fields is not None]
            if good:
                features = self._features([fields for _, fields in good])
                for (sample, _), row in zip(good, features, strict=True):
                    identity = {"identity": identify(sample)} if identify else {}
                    yield sample.key, row, {"caption": sample.caption, "image_id": sample.image_id} | identity
        lost = getattr(getattr(dataset, "patience", None), "given_up", None)
        if lost:  # a cache without them would pass for complete
            raise ConfigError(
                f"{next(iter(lost))} is out of reach, so this shard is not written. Run the same command again when it "
                "can be read; it goes on where it stopped."
            )

    def _features(self, fields: list[dict]):
        """The features of loaded pictures, float16 [B,Q,W]. Raises FloatingPointError if float16 cannot hold them."""
        import torch
        from torch.utils.data import default_collate

        from minigpt4.runners.state import to_device

        with torch.inference_mode():
            features = self.model.query_outputs(to_device(default_collate(fields), self.device)["image"]).half()
            if not features.isfinite().all():
                raise FloatingPointError("Image features are not finite in float16. Are these the right weights?")
        return features.cpu().numpy()
