"""Train the tokenizer that the language model and the Q-Former's text objective share. Seconds, no GPU.

    python dataset/tiny/recipe/train_tokenizer.py --merges 380

A small BPE in Llama's manner (a word begins with "▁", unknown characters fall back to bytes; ids 0, 1, 2 are <unk>,
<s>, </s>). Small on purpose: a linear map has to learn one vector per token from a few hundred steps.
"""

import argparse
import json
import random

from common import ASSETS, DESCRIBE_PROMPTS, SYSTEM, describe, load_concepts
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIAL = ["<unk>", "<s>", "</s>"]
MARKS = ["###", "<Img>", "</Img>", "\n"]  # always tokens of their own, whatever stands before them
ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()-&/’“”ñ▁"


def corpus(concepts: list[dict], seed: int) -> list[str]:
    """Captions count most, because the queries have to spell them; then sentences, keywords and the chat's frame."""
    rng = random.Random(seed)
    captions = [c["caption"] for c in concepts] * 12
    sentences = [describe(c, rng) for c in concepts for _ in range(2)]
    keywords = [k for c in concepts for k in c["keywords"]]
    frame = ([f" {p} Assistant: Human: " for p in DESCRIBE_PROMPTS] + [SYSTEM]) * 200
    return captions + sentences + keywords + frame


def build(texts: list[str], merges: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\w\s’]|\d"), "isolated"),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = SPECIAL + [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(ALPHABET) + merges,
        special_tokens=special,
        initial_alphabet=list(ALPHABET),
        limit_alphabet=len(ALPHABET),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def with_marks(tokenizer: Tokenizer) -> Tokenizer:
    """Only <unk>, <s>, </s> are special; the marks are plain added tokens; the bytes are ordinary vocabulary."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in MARKS])
    return tokenizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--merges", type=int, default=430)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = with_marks(build(corpus(load_concepts(), args.seed), args.merges))
    folder = ASSETS / "llama"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": 512,
        "padding_side": "right",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    used = {i for c in load_concepts() for i in tokenizer.encode(c["caption"], add_special_tokens=False).ids}
    lengths = sorted(len(tokenizer.encode(c["caption"], add_special_tokens=False).ids) for c in load_concepts())
    print(
        f"vocabulary {tokenizer.get_vocab_size()}, of which captions use {len(used)}; tokens in a caption: "
        f"median {lengths[len(lengths) // 2]}, longest {lengths[-1]}, over 16: {sum(n > 16 for n in lengths)}"
    )


if __name__ == "__main__":
    main()
