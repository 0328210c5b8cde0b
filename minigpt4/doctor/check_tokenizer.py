"""Checks of the texts: the tokenizer keeps the separators, and the prompts and samples can be used."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from minigpt4.common.errors import ConfigError
from minigpt4.common.facts import SEPARATOR, offline
from minigpt4.common.text import pluralize
from minigpt4.datasets.datasets.shards import is_local
from minigpt4.doctor.diagnostic import NOT_MADE, Diagnostic, error, ok, warning
from minigpt4.doctor.run_context import RunContext

if TYPE_CHECKING:
    from minigpt4.datasets.preview import TextReader

# A tokenizer may know this many more tokens than its model embeds: pad tokens and the like, which no text has.
ADDED_TOKENS = 64
# Samples of a dataset that are read, and the most seconds that this may take.
SAMPLES, SECONDS = 200, 30.0


def check_tokenizer(context: RunContext) -> Iterator[Diagnostic]:
    """The tokenizer belongs to the language model, and decodes the separators as they were."""
    key, max_txt_len = "model.llama_model", context.model.max_txt_len
    tokenizer = context.tokenizer
    if tokenizer is None:
        return
    rows = context.llm.vocabulary
    if len(tokenizer) > rows + ADDED_TOKENS:
        what = f"the tokenizer knows {len(tokenizer)} tokens, the model embeds {rows}: they do not belong together"
        yield error(key, what, f"Put the model's own tokenizer into {context.llm_source}.")
        return
    template, of_end = context.template, "model.template" if context.model.template else "model.end_sym"
    separators = [text for text in dict.fromkeys(template.separators) if text]
    for text in separators:
        ids = tokenizer.encode(f"a{text}")
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        if not decoded.endswith(text) or tokenizer.unk_token_id in ids:
            what = f"{text!r} becomes {decoded[1:]!r} in the tokenizer: answers would not end"
            name = of_end if text == template.end else "the separator of a chat"
            yield error(name, what, f"Choose one that the tokenizer knows (--options {of_end}=…).")
            return
    length = len(tokenizer.encode(template.end))
    if length >= max_txt_len:
        what = f"{max_txt_len} leaves no room beside the end of an answer, which has {pluralize(length, 'token')}"
        yield error("model.max_txt_len", what, f"--options model.max_txt_len={32 + length}")
        return
    yield ok("tokenizer", f"{len(tokenizer)} tokens; decodes {' and '.join(map(repr, separators))} unchanged")


def check_prompts(context: RunContext) -> Iterator[Diagnostic]:
    """The template has a place for the prompt, and each prompt has one for the image."""
    from minigpt4.models.template import read_prompts

    template, path = context.template, context.model.prompt_path
    if not path or template is None:
        return
    yield ok("model.prompt_path", pluralize(len(read_prompts(path, template.prompt)), "prompt"))
    # Stage 2's template and end_sym make a chat. One without the other teaches a model that does not stop.
    if context.model.template is None and SEPARATOR in template.prompt and SEPARATOR not in template.end:
        what = f"the template separates turns by {SEPARATOR}, but answers end with {template.end!r}"
        yield warning("model.end_sym", what, f"--options model.end_sym={SEPARATOR}")


def check_fitting(context: RunContext) -> Iterator[Diagnostic]:
    """Checkpoint, language model, tokenizer and template belong together, as far as their sizes tell."""
    from minigpt4.models.fitting import doubts

    if context.tokenizer is not None:
        llm, cfg = context.llm, context.local_model_cfg
        for doubt in doubts(cfg, context.template, context.tokenizer, llm.vocabulary, llm.config):
            yield warning(doubt.key, doubt.what, f"{doubt.fix}.")


def check_samples(context: RunContext) -> Iterator[Diagnostic]:
    """Two samples of each dataset as the model reads them, and what of the first ones is not learnt as it is."""
    from minigpt4.datasets.preview import TextReader, describe, first_texts

    if not context.training or context.tokenizer is None:
        return
    cfg = replace(context.local_model_cfg, llama_model=context.llm_source)
    reader = TextReader.from_config(cfg, context.tokenizer)
    for name in context.cfg.datasets_cfg:
        key = f"datasets.{name}"
        try:
            dataset = context.training_dataset(name)
        except ConfigError as mistake:
            yield error(key, str(mistake))
            continue
        except Exception as problem:  # a plug-in's
            yield warning(key, f"no sample can be shown: {problem}", NOT_MADE)
            continue
        if offline() and not all(is_local(str(shard)) for shard in getattr(dataset, "shards", ())):
            continue
        yield ok(key, describe(name, dataset, reader, SECONDS).removeprefix(f"{name} "))
        yield from _doubts(key, reader, [text for _, text in first_texts(dataset, SAMPLES, SECONDS)])


def _doubts(key: str, reader: "TextReader", texts: list) -> Iterator[Diagnostic]:
    """Warnings about texts that are not learnt as they are."""
    read = [replace(reader, max_txt_len=sys.maxsize).read(text) for text in texts]
    looked_at = f"of {pluralize(len(texts), 'sample')} looked at"
    lengths = [each.text_len for each in read if each.text_len > reader.max_txt_len]
    if lengths:
        what = f"{len(lengths)} {looked_at}: longer than {reader.max_txt_len} tokens; their end is cut off"
        yield warning("model.max_txt_len", f"{key}: {what}", f"--options model.max_txt_len={max(lengths)}")
    if marked := [text for text, each in zip(texts, read, strict=True) if each.broken_up]:
        what = f"{len(marked)} {looked_at}: markers of the prompt in the text, e.g. {str(marked[0])[:100]!r}"
        yield warning(key, what, "They are broken up by a space in training, as in chat.")
    if early := sum(each.ends_early for each in read):
        what = f"{early} {looked_at}: the end sign {reader.template.end!r} stands inside an answer"
        fix = "A generated answer would stop there. Take an end that no text has: model.template, or model.end_sym."
        yield warning(key, what, fix)
