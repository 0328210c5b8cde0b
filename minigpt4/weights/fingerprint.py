"""Which language model a projection was trained with: a checkpoint says so, and another model is refused.

A projection that meets another language model gives fluent nonsense, and nothing else would notice. Recorded are width,
layers, vocabulary and eight rows of the token embeddings, which stay in 16 bit whatever `load_in` says. Published
checkpoints have no fingerprint: theirs is the shape of the projection, checked where they are loaded.

D width of the language model.
"""

import logging

import numpy as np

from minigpt4.common.errors import ConfigError

KEY = "llm_fingerprint"
"""Where it stands in a checkpoint, beside "model"."""

# Rounding to another 16-bit type turns a row by far less; fine-tuning turns those of frequent tokens by more.
SAME = 0.999
SIZES = {"width": "wide", "layers": "layers", "vocabulary": "tokens"}
TEXTS = ("prompt_template", "end_sym")


class MismatchError(ConfigError):
    """A checkpoint that was trained with another language model."""


def row_ids(vocabulary: int) -> list[int]:
    """The eight rows that are compared: V/2, V/4, …, V/256. Subword vocabularies are sorted by frequency, more or less,
    so that most of these are tokens that any training would move."""
    return [vocabulary >> shift for shift in range(1, 9)]


def take(llm, name: str, prompt_template: str, end_sym: str) -> dict:
    """The fingerprint of a loaded language model, in types that a checkpoint may hold.

    Args:
        llm: transformers' model.
        name: its path or id, for messages.
        prompt_template, end_sym: what the projection is trained with; other ones are only reported.

    Returns:
        `{"name", "width", "layers", "vocabulary", "embedding_rows" [8,D] float16, "prompt_template", "end_sym"}`.
    """
    embedding = llm.get_input_embeddings().weight.detach()
    vocabulary, width = embedding.shape
    return {
        "name": name,
        "width": width,
        "layers": llm.config.get_text_config().num_hidden_layers,
        "vocabulary": vocabulary,
        "embedding_rows": embedding[row_ids(vocabulary)].half().cpu(),
        "prompt_template": prompt_template,
        "end_sym": end_sym,
    }


def check(recorded: dict | None, own: dict | None, source: str, allow_mismatch: bool = False) -> None:
    """Compare the fingerprint in the checkpoint `source` with that of the language model at hand.

    Either may be None, which passes; so may its `embedding_rows`, a tensor or array. Another template or end_sym is
    logged: stage 2 starts from stage 1.

    Raises:
        MismatchError: another language model, unless `allow_mismatch`, which makes it a warning.
    """
    if not recorded or not own:
        return
    difference = difference_of(recorded, own)
    if difference:
        message = (
            f"{source} was trained with another language model: {describe(recorded)}. "
            f"Yours is {describe(own)}: {difference}. With another one the answers are fluent nonsense."
        )
        if not allow_mismatch:
            raise MismatchError(
                f"{message} Change model.ckpt (run.resume_ckpt_path) or model.llama_model; to try it all the same: "
                "--options model.allow_llm_mismatch=true"
            )
        logging.warning("%s Allowed by model.allow_llm_mismatch.", message)
    for name in TEXTS:
        if recorded.get(name) != own.get(name):
            logging.info(
                "%s was trained with model.%s=%r; it is %r now, as from stage 1 to stage 2.",
                *(source, name, recorded.get(name), own.get(name)),
            )


def describe(fingerprint: dict) -> str:
    """`vicuna-7b (4096 wide, 32 layers, 32000 tokens)`."""
    sizes = ", ".join(f"{fingerprint[key]} {unit}" for key, unit in SIZES.items())
    return f"{fingerprint['name']} ({sizes})"


def difference_of(recorded: dict, own: dict) -> str | None:
    """What tells two language models apart, in words; None if nothing does."""
    for key in SIZES:
        if recorded[key] != own[key]:
            return f"{key} {own[key]} instead of {recorded[key]}"
    if recorded["embedding_rows"] is None or own["embedding_rows"] is None:
        return None
    similarity = cosines(np.asarray(recorded["embedding_rows"]), np.asarray(own["embedding_rows"])).min()
    if similarity > SAME:
        return None
    return f"the sizes agree, the token embeddings do not (cosine {similarity:.3f}; the same model has over {SAME})"


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The cosine of each pair of rows [N,D]; two rows of zeros are alike, one that is not finite is like none."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        similar = (first * second).sum(axis=1) / lengths
    similar = np.where((first == 0).all(axis=1) & (second == 0).all(axis=1), 1.0, similar)
    return np.nan_to_num(similar, nan=0.0, posinf=0.0, neginf=0.0)
