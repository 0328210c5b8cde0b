"""Texts with image slots become token ids and labels: the one place for training and for chat.

A text is cut at each `<ImageHere>`; every segment between is tokenised by itself, and a slot becomes as many
positions as an image has vectors. `<s>` stands once, in front.

B batch, S sequence, Q query tokens per image.
"""

from dataclasses import dataclass

import torch

from minigpt4.common.errors import ConfigError

IMAGE_SLOT = "<ImageHere>"
# Stands at the positions of image vectors until those replace it.
IMAGE_ID = -1
# Label of positions that are not learnt.
IGNORE_INDEX = -100


@dataclass
class TokenBatch:
    """Sequences of token ids, padded to one length.

    input_ids [B,S] int64, with 0 where an image vector belongs; image_mask [B,S] bool: those positions;
    attention_mask [B,S] int64: 0 on padding; labels [B,S] int64, not shifted: IGNORE_INDEX where nothing is learnt.
    """

    input_ids: torch.Tensor
    image_mask: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def label_positions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [K] whose logits some row needs, and the tokens [B,K] that they predict.

        Only these positions go through the output layer: a prompt and an image carry no label.
        """
        labels = self.labels[:, 1:]
        positions = (labels != IGNORE_INDEX).any(dim=0).nonzero().flatten()
        return positions, labels[:, positions]

    @property
    def num_labels(self) -> int:
        return int((self.labels[:, 1:] != IGNORE_INDEX).sum())


def encode_with_images(tokenizer, text: str, num_query_tokens: int) -> list[int]:
    """Token ids of `text`, after `<s>`, with `num_query_tokens` times IMAGE_ID for each image slot."""
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    first, *others = text.split(IMAGE_SLOT)
    ids += tokenizer.encode(first)
    for segment in others:
        ids += [IMAGE_ID] * num_query_tokens + tokenizer.encode(segment)
    return ids


def training_batch(
    tokenizer, prompt: str, texts: list[str], num_query_tokens: int, max_txt_len: int, end_sym: str
) -> TokenBatch:
    """`<s>`, the prompt with its image, then each text with `end_sym`, of which at most `max_txt_len` tokens are kept.

    Only the text carries labels, save where its tokens equal the padding (eos) token.
    """
    prefix = encode_with_images(tokenizer, prompt, num_query_tokens)
    sequences, labels = [], []
    for text in texts:
        ids = tokenizer.encode(text + end_sym)[:max_txt_len]
        sequences.append(prefix + ids)
        learnt = [i if i != tokenizer.eos_token_id else IGNORE_INDEX for i in ids]
        labels.append([IGNORE_INDEX] * len(prefix) + learnt)
    return _pad(sequences, labels, tokenizer.eos_token_id, side="right")


def generation_batch(tokenizer, prompts: list[str], num_query_tokens: int) -> TokenBatch:
    """Prompts to be continued, padded on the left so that all end at the same position."""
    sequences = [encode_with_images(tokenizer, prompt, num_query_tokens) for prompt in prompts]
    labels = [[IGNORE_INDEX] * len(sequence) for sequence in sequences]
    return _pad(sequences, labels, tokenizer.eos_token_id, side="left")


def _pad(sequences: list[list[int]], labels: list[list[int]], pad_id: int, side: str) -> TokenBatch:
    length = max(map(len, sequences))

    def padded(rows, value):
        fill = [[value] * (length - len(row)) for row in rows]
        return torch.tensor([r + f if side == "right" else f + r for r, f in zip(rows, fill, strict=True)])

    ids = padded(sequences, pad_id)
    return TokenBatch(
        input_ids=ids.masked_fill(ids == IMAGE_ID, 0),
        image_mask=ids == IMAGE_ID,
        attention_mask=padded([[1] * len(s) for s in sequences], 0),
        labels=padded(labels, IGNORE_INDEX),
    )


def read_prompts(path: str, template: str) -> list[str]:
    """The prompts of a text file, one a line, each wrapped in `template`; lines without an image slot are left out.

    Raises ConfigError when no line has one, when a prompt has several, or when the template has no `{}`.
    """
    if "{}" not in template:
        raise ConfigError(f"model.prompt_template={template!r} has no {{}} where the prompt goes.")
    with open(path, encoding="utf-8") as file:
        lines = file.read().splitlines()
    prompts = [template.replace("{}", line) for line in lines if IMAGE_SLOT in line]
    if not prompts:
        raise ConfigError(
            f"No line of model.prompt_path={path} holds {IMAGE_SLOT}, which says where the image goes "
            f"({len(lines)} lines read). Write for example: <Img>{IMAGE_SLOT}</Img> Describe this image in detail."
        )
    crowded = next((text for text in prompts if text.count(IMAGE_SLOT) > 1), None)
    if crowded:
        raise ConfigError(
            f"A prompt of model.prompt_path={path} holds {IMAGE_SLOT} {crowded.count(IMAGE_SLOT)} times, a training "
            f"picture goes into one: {crowded!r}"
        )
    return prompts
