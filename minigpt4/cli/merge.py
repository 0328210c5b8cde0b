"""Write the language model of a config with its LoRA adapters merged in, as a folder in Hugging Face format.

    python -m minigpt4 merge --cfg-path eval_configs/my_lora.yaml --out merged

W becomes W + B A · alpha / r, computed in float32 and rounded once to the type of the files. The original files are
read, also where model.load_in is 8 or 4 bit: the adapters were then trained around rounded weights, and the merged
model differs a little from what was trained. In the folder is also checkpoint_merged.pth, the projector and all else
that model.ckpt holds, without the adapters. The command prints the settings that take both. A folder with files is
never written to. An interrupted run leaves nothing under the name; start it again.
"""

import argparse
import logging
import shutil
from pathlib import Path

from omegaconf import OmegaConf

from minigpt4.cli.arguments import add_config_arguments
from minigpt4.common.commands import command_parser, path_argument
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.common.output import is_taken, whole_folder
from minigpt4.common.schema import MiniGPT4Config
from minigpt4.common.trained_parts import LORA, TrainedParts

CHECKPOINT = "checkpoint_merged.pth"
# Files of the language model's folder that are written anew, by the ends of their names.
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".msgpack", ".h5", ".gguf", ".index.json")


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command_parser("merge", __doc__)
    add_config_arguments(parser, "YAML file with model.lora and model.ckpt")
    parser.add_argument(
        "--out", required=True, type=path_argument, metavar="FOLDER", help="a folder that is new or empty"
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Merge, and write the folder."""
    args = parse_args(argv)
    cfg = Config(args)
    check(cfg, args.out)
    from minigpt4.common.logger import setup_logger

    setup_logger()
    with whole_folder(args.out.resolve()) as folder:
        model = load(cfg)
        merge_adapters(model.llama_model)
        write(model, cfg, folder)
    logging.info(
        "To use it: --options model.llama_model=%s model.ckpt=%s model.lora=null", args.out, args.out / CHECKPOINT
    )
    return 0


def check(cfg: Config, out: Path) -> None:
    """Raise ConfigError for a config without adapters, and for a folder that holds something."""
    if cfg.model_cfg.get("arch") != MiniGPT4Config.arch:
        raise ConfigError(f"model.arch={cfg.model_cfg.get('arch')}: only the adapters of mini_gpt4 can be merged.")
    if TrainedParts(cfg.model_cfg).lora is None:
        raise ConfigError("model.lora is not set, so there are no adapters to merge. Set it as the run had it.")
    if not cfg.model_cfg.ckpt:
        raise ConfigError("model.ckpt is not set. Name the checkpoint with the trained adapters.")
    cfg.check_paths(keys=("model.llama_model", "model.ckpt"))
    if is_taken(out):
        raise ConfigError(
            f"--out {out} exists and is not empty. Nothing was changed. Name a folder that is new or empty."
        )


def load(cfg: Config):
    """The model on the host, without vision, its language model in 16 bit or in the type of its files."""
    import torch

    from minigpt4.models import MiniGPT4, llm

    settings = OmegaConf.to_container(cfg.model_cfg)
    settings |= {"load_vision": False, "load_in": "16bit", "llm_device_map": None}
    dtype = llm.read_config(settings["llama_model"], settings["trust_remote_code"]).dtype
    model = MiniGPT4.from_config(settings, "cpu", dtype if isinstance(dtype, torch.dtype) else torch.float16)
    if not any(name.startswith("llama_model.") for name in model.from_checkpoint):
        raise ConfigError(f"model.ckpt={settings['ckpt']} has no LoRA adapters: there is nothing to merge.")
    return model


def merge_adapters(llm) -> None:
    """Put layers with merged weights in the places of the layers with adapters."""
    from torch import nn

    from minigpt4.models.lora import adapted_layers, merged_weight

    adapted = set(adapted_layers(llm))
    for parent in list(llm.modules()):
        for name, child in list(parent.named_children()):
            if child not in adapted:
                continue
            layer = child.get_base_layer()
            if type(layer) is not nn.Linear:
                raise ConfigError(
                    "model.llama_model holds quantised weights, into which nothing can be merged. Name the original "
                    "in 16 bit."
                )
            layer.weight = nn.Parameter(merged_weight(child), requires_grad=False)
            setattr(parent, name, layer)


def write(model, cfg: Config, folder: Path) -> None:
    """Write the language model, its tokenizer and other files, and the checkpoint without adapters."""
    from transformers import GenerationConfig

    from minigpt4.common.facts import is_adapter
    from minigpt4.models.lora import MERGED, digest
    from minigpt4.weights import checkpoint, fingerprint

    llm = model.llama_model
    llm.generation_config = GenerationConfig()  # the folder's own follows; the library refuses to write Vicuna's
    content = checkpoint.read_file(checkpoint.resolve(cfg.model_cfg.ckpt))
    weights = checkpoint.weights_of(content)
    setattr(llm.config, MERGED, [*getattr(llm.config, MERGED, ()), digest(weights)])
    llm.save_pretrained(folder)
    copy_other_files(cfg.model_cfg, folder)
    settings = cfg.to_dict()
    unset = {key: None for key in settings["model"] if key.startswith("lora")}
    names = settings["model"]["train"]
    unset["train"] = names and [name for name in names if name != LORA]
    weights = {name: value for name, value in weights.items() if not is_adapter(name)}
    recorded = {key: value for key, value in model.fingerprint.items() if key != LORA}
    settings["model"] |= unset
    checkpoint.save({"model": weights, "config": settings, fingerprint.KEY: recorded}, folder / CHECKPOINT)


def copy_other_files(model_cfg, folder: Path) -> None:
    """Copy what stands beside the weights of the language model; of a .gguf file, write the tokenizer."""
    from minigpt4.common.facts import is_gguf
    from minigpt4.common.registry import registry
    from minigpt4.models.llm import from_pretrained, pretrained_source

    source = model_cfg.llama_model
    if is_gguf(source):
        vocabulary = registry.get("llm_file", ".gguf").sentencepiece_model(source)
        if vocabulary:
            (folder / "tokenizer.model").write_bytes(vocabulary)
            return
        from transformers import AutoTokenizer

        from_pretrained(AutoTokenizer, source, model_cfg.trust_remote_code).save_pretrained(folder)
        return
    from transformers.utils import cached_file

    name, options = pretrained_source(source)
    for file in Path(cached_file(name, "config.json", **options)).parent.iterdir():
        if file.is_file() and file.name != "config.json" and not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, folder / file.name)
