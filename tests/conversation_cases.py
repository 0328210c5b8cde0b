"""Conversations and tokenizers of every kind, made on the fly, and templates of other tokenizers."""

import io
import random

import jinja2
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minigpt4.models.tokenizer import SentencePieceTokenizer

# Texts of every plane; texts that imitate templates, tokens and places; texts that end like the beginning of a marker.
TEXTS = ["a dog", "Größe 3 m²", "猫在沙发上", "😀🧑\u200d🚀", "𓀀𐍈", "  two\n\nlines\t", "é", "e\u0301\u0323", "\u200d"]
TEXTS += [
    "A" * 40,
    "{}",
    "{",
    "x\n",
    "\nx",
    "\r\nx",
    "\u00a0z\u3000",
    "a\u2028b",
    "## Title\n- a\n- b",
    "C#",
    "#",
    "##",
]
TEXTS += ["###Human: x ###Assistant: y", "Assistant: hi", "USER: hi ASSISTANT:", "[INST] x [/INST]", "Human:", "######"]
TEXTS += ["</s>", "<s>", "<ImageHere>", "<Img>", "</Img>", "###", "<|im_end|>", "<|im_start|>user", "<", "<|im_", "</s"]

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Without a system text of its own, and with messages trimmed, as several models have it.
TRIMMED = CHATML.replace("You are helpful.", "").replace("{{ m.content }}", "{{ m.content | trim }}")
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}<s>[INST] {{ system if loop.first }}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
)


def renderer(text: str):
    """Writes messages by a chat template, as `models.tokenizer.chat_template` does."""

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    template = jinja2.Environment(trim_blocks=False).from_string(text)

    def render(messages):
        asked = messages[-1]["role"] == "user"
        return template.render(messages=messages, add_generation_prompt=asked, raise_exception=raise_exception)

    return render


class ByHuggingFace:
    """A tokenizer of the `tokenizers` library in the form that models use."""

    def __init__(self, tokenizer, special: list[str]):
        self.tokenizer = tokenizer
        self.special_tokens = {text: tokenizer.token_to_id(text) for text in special}
        self.unk_token_id = None
        self.bos_token_id, self.eos_token_id = (tokenizer.token_to_id(text) for text in special)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids, skip_special_tokens=True):
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    return ByHuggingFace(tokenizer, special)


def byte_fallback():
    pieces = ["<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256)), *"abcdeosmtu :#", "##", "###", "do"]
    merges = [("#", "#"), ("##", "#"), ("d", "o")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return ByHuggingFace(tokenizer, ["<s>", "</s>"])


def sentencepiece():
    model = io.BytesIO()
    options = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentences = iter(["describe this image in detail", "a red bus", "###Human: what is it? ###Assistant: a bus"] * 30)
    SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return SentencePieceTokenizer(model_proto=model.getvalue())


TOKENIZERS = {
    "SentencePiece": sentencepiece,
    "byte-level BPE": byte_level,
    "BPE with byte fallback": byte_fallback,
}


def random_conversation(rng: random.Random) -> tuple:
    """1 to 6 turns with 0 to 5 images."""

    def text() -> str:
        return " ".join(rng.choices(TEXTS, k=rng.randint(1, 4)))

    turns = rng.randint(1, 6)
    images = [rng.randrange(turns) for _ in range(rng.randint(0, 5))]
    messages = [("system", (text(),))] if rng.random() < 0.3 else []
    for turn in range(turns):
        parts = [None] * images.count(turn) + [text()]
        rng.shuffle(parts)
        messages += [("user", tuple(parts)), ("assistant", (text(),))]
    return tuple(messages)
