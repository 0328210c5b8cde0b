"""Checks of the texts: the tokenizer keeps the separators, and the prompts can be used."""

from collections.abc import Iterator

from minigpt4.common.facts import SEPARATOR
from minigpt4.common.text import pluralize
from minigpt4.doctor.diagnostic import Diagnostic, error, ok, warning
from minigpt4.doctor.run_context import RunContext

# A tokenizer may know this many more tokens than its model embeds: pad tokens and the like, which no text has.
ADDED_TOKENS = 64


def check_tokenizer(context: RunContext) -> Iterator[Diagnostic]:
    """The tokenizer belongs to the language model, and decodes the separators as they were."""
    key, end_sym, max_txt_len = "model.llama_model", context.model.end_sym, context.model.max_txt_len
    tokenizer = context.tokenizer
    if tokenizer is None:
        return
    rows = context.llm.vocabulary
    if len(tokenizer) > rows + ADDED_TOKENS:
        what = f"the tokenizer knows {len(tokenizer)} tokens, the model embeds {rows}: they do not belong together"
        yield error(key, what, f"Put the model's own tokenizer into {context.llm_source}.")
        return
    for name, text in {"model.end_sym": end_sym, "the separator of a chat": SEPARATOR}.items():
        ids = tokenizer.encode(f"a{text}")
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        if not decoded.endswith(text) or tokenizer.unk_token_id in ids:
            what = f"{text!r} becomes {decoded[1:]!r} in the tokenizer: answers would not end"
            yield error(name, what, "Choose one that the tokenizer knows (--options model.end_sym=…).")
            return
    length = len(tokenizer.encode(end_sym))
    if length >= max_txt_len:
        what = f"{max_txt_len} leaves no room beside model.end_sym, which has {pluralize(length, 'token')}"
        yield error("model.max_txt_len", what, f"--options model.max_txt_len={32 + length}")
        return
    texts = " and ".join(repr(text) for text in dict.fromkeys((end_sym, SEPARATOR)))
    yield ok("tokenizer", f"{len(tokenizer)} tokens; decodes {texts} unchanged")


def check_prompts(context: RunContext) -> Iterator[Diagnostic]:
    """The template has a place for the prompt, and each prompt has one for the image."""
    from minigpt4.models.template import read_prompts

    template, path = context.model.prompt_template, context.model.prompt_path
    if not path:
        return
    yield ok("model.prompt_path", pluralize(len(read_prompts(path, template)), "prompt"))
    # Stage 2's template and end_sym make a chat. One without the other teaches a model that does not stop.
    if SEPARATOR in template and SEPARATOR not in context.model.end_sym:
        what = f"the template separates turns by {SEPARATOR}, but answers end with {context.model.end_sym!r}"
        yield warning("model.end_sym", what, f"--options model.end_sym={SEPARATOR}")
