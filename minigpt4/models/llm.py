"""Load the frozen language model, in 16, 8 or 4 bit. transformers is imported only here and only when asked for."""

import logging

import torch

LOAD_IN = ("16bit", "8bit", "4bit")


def load_llm(llama_model: str, device: torch.device, dtype: torch.dtype, load_in: str = "16bit"):
    """Load any decoder that transformers' Auto classes know, frozen and in eval mode.

    Args:
        llama_model: folder in Hugging Face format, or a hub id.
        device: where it lies; nothing is loaded elsewhere first.
        dtype: type of the weights that are not quantised.
        load_in: "16bit" (meaning `dtype`), "8bit" (LLM.int8) or "4bit" (nf4); the latter two through bitsandbytes.

    Raises:
        ValueError: unknown `load_in`.
    """
    from transformers import AutoModelForCausalLM

    if load_in not in LOAD_IN:
        raise ValueError(f"model.load_in={load_in!r} is not one of {', '.join(LOAD_IN)}.")
    logging.info("Loading the language model from %s in %s", llama_model, load_in if load_in != "16bit" else dtype)
    llm = AutoModelForCausalLM.from_pretrained(
        llama_model,
        dtype=dtype,
        device_map={"": device},
        quantization_config=_quantization(load_in, dtype),
    )
    return llm.requires_grad_(False).eval()


def _quantization(load_in: str, dtype: torch.dtype):
    if load_in == "16bit":
        return None
    from transformers import BitsAndBytesConfig

    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def hidden_size(llama_model: str) -> int:
    """Width of the language model, read from its config alone."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(llama_model).get_text_config().hidden_size
