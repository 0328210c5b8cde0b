"""Checks of texts: does the tokenizer keep the template's signs, and are the prompts of use?"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minigpt4.common.text import pluralize
from minigpt4.doctor.case import RunContext
from minigpt4.doctor.findings import Diagnostic, error, ok, warning

IMAGE_SLOT = "<ImageHere>"
# A tokenizer may know so many more tokens than its model embeds: pad tokens and the like, which no text has.
ADDED_TOKENS = 64


@dataclass(frozen=True)
class Tokenizer:
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    size: int
    unknown: int | None


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a language model's folder, by the libraries below transformers; None: it has another form.

    Raises whatever those raise for a broken file.
    """
    if (folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        added = folder / "added_tokens.json"
        more = len(json.loads(added.read_text(encoding="utf-8"))) if added.is_file() else 0
        return Tokenizer(model.encode, model.decode, len(model) + more, model.unk_id())
    if (folder / "tokenizer.json").is_file():
        import tokenizers

        fast = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        return Tokenizer(
            lambda text: fast.encode(text, add_special_tokens=False).ids,
            lambda ids: fast.decode(ids, skip_special_tokens=False),
            fast.get_vocab_size(),
            next((i for name in ("<unk>", "[UNK]") if (i := fast.token_to_id(name)) is not None), None),
        )
    return None


def check_tokenizer(case: RunContext) -> Iterator[Diagnostic]:
    """The tokenizer belongs to the language model, and gives the separator back as it was."""
    key = "model.llama_model"
    if case.llm_folder is None:
        return
    try:
        tokenizer = load_tokenizer(case.llm_folder)
    except Exception as problem:  # the two libraries share no base class
        yield error(key, f"the tokenizer in {case.llm_folder} cannot be read: {problem}", "Fetch its files again.")
        return
    if tokenizer is None:
        return
    rows = case.llm.vocabulary if case.llm else None
    if rows is not None and tokenizer.size > rows + ADDED_TOKENS:
        what = f"the tokenizer knows {tokenizer.size} tokens, the model embeds {rows}: they do not belong together"
        yield error(key, what, f"Put the model's own tokenizer into {case.llm_folder}.")
        return
    for name, sign in {"model.end_sym": case.model.end_sym, "the separator of a chat": "###"}.items():
        ids = tokenizer.encode(f"a{sign}")
        if not tokenizer.decode(ids).endswith(sign) or tokenizer.unknown in ids:
            what = f"{sign!r} comes back from the tokenizer as {tokenizer.decode(ids)[1:]!r}: answers would not end"
            yield error(name, what, "Choose one that the tokenizer knows (--options model.end_sym=…).")
            return
    length = len(tokenizer.encode(case.model.end_sym))
    if length >= case.model.max_txt_len:
        what = f"{case.model.max_txt_len} leaves no room beside model.end_sym, which has {pluralize(length, 'token')}"
        yield error("model.max_txt_len", what, f"--options model.max_txt_len={32 + length}")
        return
    signs = " and ".join(repr(sign) for sign in dict.fromkeys((case.model.end_sym, "###")))
    yield ok("tokenizer", f"{tokenizer.size} tokens; it gives {signs} back unchanged")


def check_template(case: RunContext) -> Iterator[Diagnostic]:
    """The template has a place for the prompt, and each prompt one for the image."""
    template, path = case.model.prompt_template, case.model.prompt_path
    if not path or not Path(path).expanduser().is_file():
        return
    if "{}" not in template:
        fix = "For example: '###Human: {} ###Assistant: '"
        yield error("model.prompt_template", f"{template!r} has no {{}} where the prompt goes", fix)
        return
    lines = Path(path).expanduser().read_text(encoding="utf-8", errors="replace").splitlines()
    slots = [line.count(IMAGE_SLOT) for line in lines]
    if not any(slots):
        fix = f"Write for example: <Img>{IMAGE_SLOT}</Img> Describe this image in detail."
        yield error("model.prompt_path", f"no line of {path} holds {IMAGE_SLOT}, where the image goes", fix)
    elif max(slots) > 1:
        yield error("model.prompt_path", f"a line of {path} holds {IMAGE_SLOT} {max(slots)} times", "Leave one.")
    else:
        yield ok("model.prompt_path", pluralize(sum(slots), "prompt"))
    # Stage 2's template and end_sym make a chat; one without the other teaches a model that does not stop.
    if "###" in template and "###" not in case.model.end_sym:
        what = f"the template separates turns by ###, but an answer is taught to end with {case.model.end_sym!r}"
        yield warning("model.end_sym", what, "--options model.end_sym=###")
