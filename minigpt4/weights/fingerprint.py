"""A checkpoint records the language model that its projection was trained with; another model is refused.

With another language model the answers are fluent nonsense, and nothing else would reveal it. The fingerprint consists
of width, layers, vocabulary and eight rows of the token embeddings, which are in 16 bit for every `load_in`. Published
checkpoints have no fingerprint; for them only the shape of the projection is checked, when they are loaded.

A fingerprint also names the trained parts that differ from the paper's one linear layer: "projector" and "lora".

D width of the language model.
"""

import json
import logging

import numpy as np

from minigpt4.common.errors import ConfigError

KEY = "llm_fingerprint"
"""Its key in a checkpoint."""

# Least cosine of two equal rows. Rounding to another 16-bit type changes a row far less, and fine-tuning changes the
# rows of frequent tokens more.
SAME = 0.999
SIZES = {"width": "wide", "layers": "layers", "vocabulary": "tokens"}
TEXTS = ("prompt_template", "end_sym")


class MismatchError(ConfigError):
    """A checkpoint that was trained with another language model."""


def row_ids(vocabulary: int) -> list[int]:
    """The eight rows that are compared: V/2, V/4, …, V/256.

    Subword vocabularies are roughly sorted by frequency, so any training changes most of these rows.
    """
    return [vocabulary >> shift for shift in range(1, 9)]


def take(llm, name: str, prompt_template: str, end_sym: str, template: dict | None = None) -> dict:
    """The fingerprint of a loaded language model, in types that a checkpoint may hold.

    Args:
        llm: the model of transformers.
        name: its path or id, for messages.
        prompt_template, end_sym: the text around a question and after an answer. A difference is only logged.
        template: the texts of `model.template`, if it is set. Then a difference is an error.

    Returns:
        `{"name", "width", "layers", "vocabulary", "embedding_rows" [8,D] float16, "prompt_template", "end_sym"}`, and
        "template" if it is set.
    """
    embedding, layers = llm.get_input_embeddings().weight.detach(), llm.config.get_text_config().num_hidden_layers
    texts = {"prompt_template": prompt_template, "end_sym": end_sym} | ({"template": template} if template else {})
    return of_weights(embedding, layers, name) | texts


def of_weights(embedding, layers: int, name: str) -> dict:
    """The part of a fingerprint that identifies the language model, from its token embeddings [V,D]."""
    vocabulary, width = embedding.shape
    sizes = {"width": width, "layers": layers, "vocabulary": vocabulary}
    return {"name": name, **sizes, "embedding_rows": embedding[row_ids(vocabulary)].half().cpu()}


def check(recorded: dict | None, own: dict | None, source: str, allow_mismatch: bool = False) -> None:
    """Compare the fingerprint in the checkpoint `source` with the fingerprint of the loaded language model.

    If either is None, the check passes. Another prompt_template or end_sym is logged: stage 2 starts from stage 1.

    Raises:
        MismatchError: another language model, or another `model.template`; with `allow_mismatch` it is a warning.
    """
    if not recorded or not own:
        return
    if not isinstance(recorded, dict):
        raise MismatchError(f"{source}: its {KEY!r} is of type {type(recorded).__name__}, which is no fingerprint.")
    difference = difference_of(recorded, own)
    if difference:
        message = (
            f"{source} was trained with another language model: {describe(recorded)}. "
            f"Yours is {describe(own)}: {difference}. With another one the answers are fluent nonsense."
        )
        _refuse(f"{message} Change model.ckpt (run.resume_ckpt_path) or model.llama_model", allow_mismatch)
    if _other_template(recorded, own):
        theirs = recorded.get("template") or {name: recorded.get(name) for name in TEXTS}
        trained = json.dumps(theirs, ensure_ascii=False)
        message = (
            f"{source} was trained with another template: {trained}. Set model.template to its name (auto, if it is "
            "the tokenizer's own) or to that mapping, or to null with these model.prompt_template and model.end_sym"
        )
        _refuse(message, allow_mismatch)
        return
    for name in TEXTS:
        if recorded.get(name) != own.get(name):
            logging.info(
                "%s was trained with model.%s=%r; it is %r now, as from stage 1 to stage 2.",
                *(source, name, recorded.get(name), own.get(name)),
            )


def _refuse(message: str, allow_mismatch: bool) -> None:
    if not allow_mismatch:
        raise MismatchError(f"{message}; to try it all the same: --options model.allow_llm_mismatch=true")
    logging.warning("%s. Allowed by model.allow_llm_mismatch.", message)


def _other_template(recorded: dict, own: dict) -> bool:
    """Whether two templates differ, one of them set by `model.template`. Stage 1, whose prompt is bare, has none."""
    theirs, mine = recorded.get("template"), own.get("template")
    if theirs and mine:
        return theirs != mine
    bare = recorded.get("prompt_template") in (None, "{}")
    return bool(theirs or mine) and not bare and any(recorded.get(name) != own.get(name) for name in TEXTS)


def describe(fingerprint: dict) -> str:
    """`vicuna-7b (4096 wide, 32 layers, 32000 tokens)`."""
    if not fingerprint.keys() >= SIZES.keys():  # a plug-in's own form
        return str(fingerprint)
    sizes = ", ".join(f"{fingerprint[key]} {unit}" for key, unit in SIZES.items())
    return f"{fingerprint['name']} ({sizes})"


def difference_of(recorded: dict, own: dict) -> str | None:
    """The first difference of two language models, in words; None: they are the same."""
    if not recorded.keys() >= SIZES.keys() or not own.keys() >= SIZES.keys():  # a plug-in's own form
        return None if recorded == own else f"{own} instead of {recorded}"
    for key in SIZES:
        if recorded[key] != own[key]:
            return f"{key} {own[key]} instead of {recorded[key]}"
    similarity = cosines(np.asarray(recorded["embedding_rows"]), np.asarray(own["embedding_rows"])).min()
    if similarity > SAME:
        return None
    return f"the sizes agree, the token embeddings do not (cosine {similarity:.3f}; the same model has over {SAME})"


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The cosine of each pair of rows [N,D]: 1 for two rows of zeros, 0 for a row that is not finite."""
    first, second = first.astype(np.float64), second.astype(np.float64)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        similar = (first * second).sum(axis=1) / lengths
    similar = np.where((first == 0).all(axis=1) & (second == 0).all(axis=1), 1.0, similar)
    return np.nan_to_num(similar, nan=0.0, posinf=0.0, neginf=0.0)
