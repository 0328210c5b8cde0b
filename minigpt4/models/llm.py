"""Load the frozen language model, in 16, 8 or 4 bit. transformers is imported only here and only when asked for."""

import logging
from pathlib import Path

import torch

from minigpt4.common.errors import ConfigError
from minigpt4.models import int8


def load_llm(llama_model: str, device: torch.device, dtype: torch.dtype, load_in: str = "16bit"):
    """Load any decoder that transformers' Auto classes know, frozen and in eval mode.

    Args:
        llama_model: folder in Hugging Face format, or a hub id.
        device: where it lies; nothing is loaded elsewhere first, unless `load_in` says so.
        dtype: type of the weights that are not quantised.
        load_in: "16bit" (meaning `dtype`), "8bit" (LLM.int8) or "4bit" (nf4), these two through bitsandbytes, or
            "8bit_weights" (`int8.py`), which reads the weights into host memory first.

    Raises:
        ConfigError: there is no language model at `llama_model`.
    """
    from transformers import AutoModelForCausalLM

    logging.info("Loading the language model from %s in %s", llama_model, load_in if load_in != "16bit" else dtype)
    _check_folder(llama_model)
    llm = AutoModelForCausalLM.from_pretrained(
        llama_model,
        dtype=dtype,
        device_map={"": "cpu" if load_in == "8bit_weights" else device},
        quantization_config=_quantization(load_in, dtype),
    )
    if load_in == "8bit_weights":
        llm = int8.quantize(llm, device)
    return llm.requires_grad_(False).eval()


def embedding_dim(llama_model: str) -> int:
    """Width of the language model's token embeddings, read from its config alone. Raises like `load_llm`."""
    from transformers import AutoConfig

    _check_folder(llama_model)
    config = AutoConfig.from_pretrained(llama_model).get_text_config()
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


def _check_folder(llama_model: str) -> None:
    path = Path(llama_model)
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        raise ConfigError(
            f"model.llama_model={llama_model} is no language model: a folder in Hugging Face format has a config.json."
        )


def _quantization(load_in: str, dtype: torch.dtype):
    if load_in in ("16bit", "8bit_weights"):
        return None
    from transformers import BitsAndBytesConfig

    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
