"""Loading the frozen language model in 16, 8 or 4 bit. transformers is imported inside the functions."""

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from minigpt4.common import compat, facts
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.common.text import listed, pluralize
from minigpt4.weights import checkpoint
from minigpt4.weights import locate as weight_files
from minigpt4.weights.checkpoint import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from minigpt4.models.tokenizer import Tokenizer

# A sentence with a low loss in any model of English, the tiny default's included.
SENTENCE = "The image shows a red apple."


@contextlib.contextmanager
def announced(part: str) -> Iterator[None]:
    """Log the lines of the first release before and after loading a part. It is a decorator, too."""
    logging.info("Loading %s", part)
    yield
    logging.info("Loading %s Done", part)


@announced("LLAMA")
def load_llm(
    llama_model: str,
    device: torch.device,
    dtype: torch.dtype,
    load_in: str = "16bit",
    device_map: str | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """Load any decoder that transformers' Auto classes know, frozen and in eval mode.

    Args:
        llama_model: a folder in Hugging Face format, a hub id, or a .gguf file, which is first converted to `dtype`.
        device: device of the weights, which are copied to it directly from the mapped files.
        dtype: dtype of the weights that are not quantised.
        load_in: "16bit" (meaning `dtype`); "8bit" or "4bit" (nf4), quantised by bitsandbytes; or "8bit_weights", 8 bit
            without bitsandbytes (`quantization/int8.py`).
        device_map: "auto" spreads the layers over the GPUs, from `device` on, and then the host. None: all are on
            `device`.
        trust_remote_code: run the Python files that come with the model.

    Raises:
        ConfigError: there is no language model at `llama_model`, or it cannot be loaded with these settings.
        CheckpointError: tensors are missing from its files or have other shapes; a file differs from its checksums; a
            number is not finite.
    """
    check_settings(llama_model, device, load_in, device_map)
    logging.info("Loading the language model from %s in %s", llama_model, load_in if load_in != "16bit" else dtype)
    from minigpt4.quantization import convert_layers

    # On the host, weights of unchanged dtype are mapped from disk. Each layer is read when it is rounded.
    mapped = load_in == "8bit_weights"
    options = {"dtype": "auto" if mapped and not facts.is_gguf(llama_model) else dtype, **_quantization(load_in, dtype)}

    def read(device_map: str | dict) -> "PreTrainedModel":
        llm = _read(llama_model, trust_remote_code, device_map=device_map, **options)
        return convert_layers(llm, load_in, device, dtype)

    on_one = {"": "cpu" if mapped else device}
    llm = read(device_map or on_one)
    first, wanted = llm.get_input_embeddings().weight.device, torch.empty(0, device=device).device
    if first != wanted and first.type == wanted.type and len({p.device for p in llm.parameters()}) == 1:
        del llm  # "auto" puts a small model on the last GPU
        logging.info("It is small enough for one GPU and is loaded on %s as a whole.", wanted)
        llm, first = read(on_one), wanted
    if first != wanted:
        raise ConfigError(
            f"model.llm_device_map={device_map} puts the first layer on {first}, but the vision side is on {device}. "
            "Use the first GPU (--gpu-id 0)."
        )
    _check_numbers(llm, llama_model, load_in)
    return llm.requires_grad_(False).eval()


def check_settings(llama_model: str, device: torch.device, load_in: str, device_map: str | None) -> None:
    """Raise the ConfigErrors of `load_llm` that need no weights."""
    _check_path(llama_model)
    if device.type == "mps" and load_in in ("8bit", "4bit"):
        raise ConfigError(
            f"model.load_in={load_in} (8bit with model.low_resource) is bitsandbytes', which computes on NVIDIA's GPUs "
            "and CPUs. On an Apple GPU: --options model.low_resource=False model.load_in=16bit, or 8bit_weights; or "
            "run.device=cpu."
        )
    processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if device_map and processes > 1:
        raise ConfigError(
            f"model.llm_device_map={device_map} spreads one model over the GPUs, but {processes} "
            "processes were started, each with a model of its own. Start one, or unset it."
        )
    if device_map and load_in == "8bit_weights":
        raise ConfigError("model.load_in=8bit_weights takes one GPU. Unset model.llm_device_map, or use 8bit.")


def _check_numbers(llm: "PreTrainedModel", llama_model: str, load_in: str) -> None:
    """Raise CheckpointError for files that differ from their checksums, and numbers that are not finite.

    Layers that bitsandbytes has quantised no longer show them: then the files are looked at.
    """
    scales = (pair for pair in llm.named_buffers() if pair[0].endswith(".scale"))
    tensors = itertools.chain(llm.named_parameters(), scales)
    checkpoint.check_finite(tensors, f"the language model {llama_model}")
    if facts.is_gguf(llama_model):
        return
    from transformers.utils import cached_file

    folder = Path(cached_file(llama_model, "config.json", **pretrained_source(llama_model)[1])).parent
    for name in weight_files.shards(folder):
        if load_in in ("8bit", "4bit"):
            checkpoint.check_finite(checkpoint.read_weights(folder / name).items(), str(folder / name))
        elif not name.endswith(".safetensors"):
            checkpoint.check_archive(folder / name)


def from_pretrained(auto_class: type, llama_model: str, trust_remote_code: bool, **options: Any) -> Any:
    """Call the `from_pretrained` of one of transformers' Auto classes. Its errors are turned into ours.

    The model's own code runs only with `trust_remote_code`; transformers does not ask at the terminal.
    """
    _check_path(llama_model)
    name, source = pretrained_source(llama_model)
    with _errors_of(llama_model):
        return auto_class.from_pretrained(name, trust_remote_code=trust_remote_code, **options, **source)


@contextlib.contextmanager
def _errors_of(llama_model: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise  # for example, the GPU is out of memory
        raise _unreadable(llama_model, error) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise ConfigError(f"model.llama_model={llama_model} cannot be loaded: {_first_line(error)}") from error
        raise ConfigError(
            f"model.llama_model={llama_model} comes with Python files of its own, without which transformers cannot "
            "load it. They can do whatever you can. Read them; to run them: --options model.trust_remote_code=True"
        ) from error
    except OSError as error:
        hint = " Nothing may be fetched (--offline or HF_HUB_OFFLINE)." if facts.offline() else ""
        raise ConfigError(
            f"model.llama_model={llama_model} cannot be loaded: {_first_line(error)}{hint} Give a folder, or a "
            "model's id on the hub."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_config(llama_model: str, trust_remote_code: bool = False) -> "PreTrainedConfig":
    """transformers' config of the decoder. Raises the errors of `load_llm`."""
    if facts.is_gguf(llama_model):
        _check_path(llama_model)
        with _errors_of(llama_model):
            return registry.get("llm_file", ".gguf").read_config(llama_model)
    from transformers import AutoConfig

    return from_pretrained(AutoConfig, llama_model, trust_remote_code).get_text_config()


def embedding_dim(llama_model: str, trust_remote_code: bool = False) -> int:
    """Width of the language model's token embeddings, from its config alone. Raises the errors of `load_llm`."""
    config = read_config(llama_model, trust_remote_code)
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


def pretrained_source(llama_model: str) -> tuple[str, dict]:
    """Arguments of transformers' `from_pretrained` for `llama_model`: a folder or hub id, and keyword arguments."""
    options = {"local_files_only": True} if facts.offline() else {}
    path = Path(llama_model)
    if facts.is_gguf(llama_model):
        return str(path.parent), options | {"gguf_file": path.name}
    return llama_model, options


def _check_path(llama_model: str) -> None:
    """Raise ConfigError for a folder or file without a language model, or without all of its shards."""
    path = Path(llama_model)
    if path.is_file() and facts.is_gguf(llama_model):
        if find_spec("gguf") is None:
            raise ConfigError(f"model.llama_model={path}: reading a .gguf file needs a package: pip install gguf")
        registry.get("llm_file", ".gguf").check(path)
        return
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        raise ConfigError(
            f"model.llama_model={llama_model} is no language model: a folder in Hugging Face format has a config.json, "
            "and a file must be a .gguf."
        )
    missing = weight_files.missing_shards(path)
    if missing:
        raise ConfigError(
            f"model.llama_model={llama_model} lacks {len(missing)} of {len(weight_files.shards(path))} shards: "
            f"{', '.join(missing)}. Fetch them into it."
        )


@torch.inference_mode()
def check_answers(llm: "PreTrainedModel", tokenizer: "Tokenizer", llama_model: str) -> None:
    """Look for broken weights with one forward pass over a plain sentence [1,T].

    A loss near ln V, the loss of guessing among the V tokens of the vocabulary, is logged as a warning.

    Raises CheckpointError if the logits are not finite.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.tensor([bos + tokenizer.encode(SENTENCE)], device=llm.get_input_embeddings().weight.device)
    output = llm(input_ids=ids, labels=ids, use_cache=False)
    if not torch.isfinite(output.logits).all():
        raise CheckpointError(
            f"The language model {llama_model} is broken: its logits for {SENTENCE!r} are not finite. Likely causes: a "
            "damaged file (compare its hash), or numbers that float16 cannot hold (run.amp_dtype=bf16)."
        )
    loss, guessing = output.loss.item(), math.log(output.logits.shape[-1])
    if loss > 0.95 * guessing:
        logging.warning(
            "The language model %s knows no language: its loss on %r is %.2f, and guessing gives ln V = %.2f. Likely "
            "causes: delta weights that were never merged with LLaMA's, random weights, another model's tokenizer.",
            *(llama_model, SENTENCE, loss, guessing),
        )


def recompute_layers(llm: "PreTrainedModel", count: int) -> None:
    """Make the first `count` layers recompute their activations in the backward pass instead of keeping them."""
    layers = compat.decoder_layers(llm) if count else []
    for index, layer in enumerate(layers[:count]):
        layers[index] = compat.recomputed(layer)


def _read(llama_model: str, trust_remote_code: bool, **options: Any) -> "PreTrainedModel":
    """Load the model. Missing and reshaped tensors are a CheckpointError; a warning is logged for surplus ones."""
    # Without `ignore_mismatched_sizes` transformers would raise an error of its own.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    if facts.is_gguf(llama_model):
        with _errors_of(llama_model):
            llm, info = registry.get("llm_file", ".gguf").load_model(llama_model, **options)
    else:
        from transformers import AutoModelForCausalLM

        llm, info = from_pretrained(AutoModelForCausalLM, llama_model, trust_remote_code, **options)
    missing = sorted(info["missing_keys"])
    reshaped = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
    if missing or reshaped:
        problems = [*(f"{name} is missing" for name in missing), *(f"{name} has another shape" for name in reshaped)]
        raise CheckpointError(f"The weights in {llama_model} do not fit its config:\n  {checkpoint.below(problems)}")
    surplus = sorted(name for name in info["unexpected_keys"] if not name.endswith("rotary_emb.inv_freq"))
    if surplus:
        count = pluralize(len(surplus), "tensor")
        logging.warning("Not used of %s: %s: %s", llama_model, count, listed(surplus, 5, more=" …"))
    return llm


def _unreadable(llama_model: str, error: Exception) -> CheckpointError:
    """An error that names the broken files and the reasons, if they can be found."""
    folder = Path(llama_model)
    reasons = {name: weight_files.why_unreadable(folder / name) for name in weight_files.shards(folder)}
    broken = [f"{name}: {reason}" for name, reason in reasons.items() if reason] or [_first_line(error)]
    return CheckpointError(f"The weights in {llama_model} cannot be read. " + "; ".join(broken))


def _quantization(load_in: str, dtype: torch.dtype) -> dict:
    """Arguments of `from_pretrained` for `load_in`: none in 16 bit, so that quantised folders load unchanged."""
    if load_in in ("16bit", "8bit_weights"):
        return {}
    from transformers import BitsAndBytesConfig

    compat.silence_bitsandbytes()
    if load_in == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return {"quantization_config": config}
