"""Parts that load, and do not belong together: the answers would be fluent nonsense, or empty.

Training, everything that answers, and doctor ask here.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from minigpt4.common.facts import SEPARATOR
from minigpt4.common.schema import MiniGPT4Config
from minigpt4.models.template import TEMPLATES, FirstRelease, Template
from minigpt4.weights import checkpoint, fingerprint

if TYPE_CHECKING:
    from minigpt4.models.tokenizer import Tokenizer

# Shapes of the published projections: the widths of Vicuna-7B and 13B, and that of the Q-Former.
WIDTHS, QFORMER_WIDTH = (4096, 5120), 768
# The vocabularies of Vicuna v0, which has a pad token, and of later ones and Llama 2.
V0_TOKENS, LATER_TOKENS = 32001, 32000
# Positions of LLaMA and Vicuna up to v1.1; Llama 2 and Vicuna v1.5 have twice as many.
LLAMA_POSITIONS = 2048


class Doubt(NamedTuple):
    """A reason why the answers may be bad."""

    key: str
    what: str
    fix: str


def log_doubts(section: Mapping[str, Any], model: Any) -> None:
    """Log the doubts about a `MiniGPT4` that was built from the `model:` section. Raises what `doubts` raises."""
    from minigpt4.models.mini_gpt4 import MiniGPT4

    if isinstance(model, MiniGPT4):
        llm, cfg = model.llama_model, MiniGPT4Config.from_section(section)
        rows = llm.get_input_embeddings().weight.shape[0]
        for doubt in doubts(cfg, model.template, model.tokenizer, rows, llm.config.get_text_config()):
            logging.warning("%s: %s. %s", *doubt)


def doubts(
    cfg: MiniGPT4Config, template: Template, tokenizer: "Tokenizer", vocabulary: int, llm_config: Any
) -> Iterator[Doubt]:
    """The doubts about a language model with `vocabulary` token embeddings, its tokenizer, template and checkpoint.

    Raises MismatchError for a published projection under another `model.template`, unless `model.allow_llm_mismatch`.
    """
    trained_with = published_with(cfg.ckpt) if cfg.ckpt else None
    if trained_with:
        yield from _other_llm(cfg, trained_with, llm_version(tokenizer, vocabulary, llm_config))
        yield from _other_template(cfg, trained_with, template)
    if isinstance(template, FirstRelease) and SEPARATOR in template.prompt and _ends_with_a_blank(tokenizer, template):
        yield Doubt(
            "model.template",
            f"training's prompts end in {template.question.removeprefix('{}')!r}, whose last blank is a token of its "
            "own in this tokenizer; chat's prompts, in the form of the first release, end without it and begin with "
            "its system text. Answers may be empty or repeat that text",
            "For a layer of your own: --options model.template=auto, the tokenizer's own chat template, or vicuna_v1",
        )


def published_with(ckpt: str) -> str | None:
    """The template that a published projection was trained with, "vicuna_v0" or "llama2". None: it is another file.

    Published files hold the layer alone, and nothing about their language model. For Llama 2 their names say so.
    """
    path = checkpoint.resolve(ckpt)
    content = checkpoint.read_file(path)
    weights = checkpoint.weights_of(content, str(path))
    shape = tuple(weights["llama_proj.weight"].shape) if "llama_proj.weight" in weights else ()
    is_own = fingerprint.KEY in content or "config" in content
    if is_own or shape not in [(width, QFORMER_WIDTH) for width in WIDTHS] or len(weights) > 2:
        return None
    return "llama2" if re.search("llama.?2", path.name, re.IGNORECASE) else "vicuna_v0"


def llm_version(tokenizer: "Tokenizer", vocabulary: int, llm_config: Any) -> str:
    """The language models that have these sizes, in words. Vicuna v0 alone has a token [PAD], which makes it 32,001."""
    positions = getattr(llm_config, "max_position_embeddings", LLAMA_POSITIONS)
    if vocabulary == V0_TOKENS or "[PAD]" in tokenizer.special_tokens and vocabulary == LATER_TOKENS:
        return "Vicuna v0"
    if vocabulary != LATER_TOKENS:
        return "no Vicuna"
    return "Vicuna v1.1 or LLaMA" if positions <= LLAMA_POSITIONS else "Vicuna v1.5 or Llama 2"


def _other_llm(cfg: MiniGPT4Config, trained_with: str, version: str) -> Iterator[Doubt]:
    wanted = {"vicuna_v0": "Vicuna v0", "llama2": "Vicuna v1.5 or Llama 2"}[trained_with]
    if version != wanted:
        name = {"vicuna_v0": "Vicuna v0", "llama2": "Llama 2 chat"}[trained_with]
        yield Doubt(
            "model.llama_model",
            f"the published projection {cfg.ckpt} was trained with {name}; {cfg.llama_model} is {version} by its "
            "numbers of tokens and positions. With another one the answers are fluent nonsense",
            f"Use {name} (docs/weights.md#vicuna), or a layer that was trained with your language model",
        )


def _other_template(cfg: MiniGPT4Config, trained_with: str, template: Template) -> Iterator[Doubt]:
    if template == TEMPLATES[trained_with] or (trained_with == "vicuna_v0" and isinstance(template, FirstRelease)):
        return
    what = f"the published projection {cfg.ckpt} was trained with the template {trained_with}"
    fix = f"Use it: --options model.template={trained_with}"
    if cfg.template is not None and not cfg.allow_llm_mismatch:
        raise fingerprint.MismatchError(
            f"model.template={cfg.template}: {what}. {fix}; to try yours all the same: model.allow_llm_mismatch=true"
        )
    yield Doubt("model.template", what, fix)


def _ends_with_a_blank(tokenizer: "Tokenizer", template: Template) -> bool:
    """Whether a prompt's last token is a blank alone, in a tokenizer that puts none before each text by itself."""
    blank = tokenizer.encode(" ")
    adds_none = " " not in tokenizer.decode(tokenizer.encode("x") + tokenizer.encode("a"))
    return adds_none and template.question.endswith(" ") and tokenizer.encode(template.question)[-len(blank) :] == blank
