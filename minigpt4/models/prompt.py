"""Texts with image slots become token ids and labels: the one place for training and for chat.

Training batches come in two forms with the same interface, `PaddedBatch` here and `PackedBatch` in packing.py.

A text is cut at each `<ImageHere>`; every segment between is tokenised by itself, and a slot becomes as many
positions as an image has vectors. `<s>` stands once, in front.

B batch, S sequence, Q query tokens per image.
"""

import copy
from dataclasses import dataclass

import torch

from minigpt4.common.errors import ConfigError
from minigpt4.common.facts import IMAGE_SLOT

# Stands at the positions of image vectors until those replace it.
IMAGE_ID = -1
# Label of positions that are not learnt.
IGNORE_INDEX = -100


@dataclass
class PaddedBatch:
    """Sequences of token ids, padded to one length.

    input_ids [B,S] int64, with 0 where an image vector belongs; image_positions [images * Q] int64: those positions,
    pluralize through all rows; attention_mask [B,S] int64: 0 on padding; labels [B,S] int64, not shifted: IGNORE_INDEX
    where nothing is learnt.
    """

    input_ids: torch.Tensor
    image_positions: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def __post_init__(self):
        labels = self.labels[:, 1:]
        # Positions [K] whose logits some row needs: a prompt and an image carry no label.
        self.logits_to_keep = (labels != IGNORE_INDEX).any(dim=0).nonzero().flatten()
        # [B,K] the tokens that those predict, IGNORE_INDEX where a row has no label there.
        self.targets = labels[:, self.logits_to_keep]
        self.num_labels = int((labels != IGNORE_INDEX).sum())
        self.num_tokens, self.num_image_vectors = int(self.attention_mask.sum()), len(self.image_positions)

    @property
    def pieces(self) -> list["PaddedBatch"]:
        """What the language model takes at a time: all of it."""
        return [self]

    def insert(self, embeds: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """The embeddings [B,S,D], with the image vectors [images * Q,D] in their places."""
        return embeds.flatten(0, 1).index_copy(0, self.image_positions, vectors).view_as(embeds)

    def llm_inputs(self) -> dict:
        """What the language model is called with in training, beside the embeddings [B,S,D].

        Padding stands on the right, after every label, so causal attention needs no mask.
        """
        return {"logits_to_keep": self.logits_to_keep}

    def to(self, device: torch.device, non_blocking: bool = False) -> "PaddedBatch":
        moved = copy.copy(self)
        for name, value in self._tensors():
            setattr(moved, name, value.to(device, non_blocking=non_blocking))
        return moved

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        for _, value in self._tensors():
            value.record_stream(stream)

    def _tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [(name, value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)]


def encode_with_images(tokenizer, text: str, num_query_tokens: int) -> list[int]:
    """Token ids of `text`, after `<s>`, with `num_query_tokens` times IMAGE_ID for each image slot."""
    ids = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    first, *others = text.split(IMAGE_SLOT)
    ids += tokenizer.encode(first)
    for segment in others:
        ids += [IMAGE_ID] * num_query_tokens + tokenizer.encode(segment)
    return ids


def training_sequences(
    tokenizer, prompt: str, texts: list[str], num_query_tokens: int, max_txt_len: int, end_sym: str
) -> tuple[list[list[int]], list[list[int]]]:
    """`<s>`, the prompt with its image, then each text with `end_sym`, of which at most `max_txt_len` tokens are kept.

    Returns the sequences, IMAGE_ID where image vectors belong, and their labels, not shifted. Only the text carries
    labels, save where its tokens equal the padding (eos) token.
    """
    prefix = encode_with_images(tokenizer, prompt, num_query_tokens)
    sequences, labels = [], []
    for text in texts:
        ids = tokenizer.encode(text + end_sym)[:max_txt_len]
        sequences.append(prefix + ids)
        learnt = [i if i != tokenizer.eos_token_id else IGNORE_INDEX for i in ids]
        labels.append([IGNORE_INDEX] * len(prefix) + learnt)
    return sequences, labels


def generation_batch(tokenizer, prompts: list[str], num_query_tokens: int) -> PaddedBatch:
    """Prompts to be continued, padded on the left so that all end at the same position."""
    sequences = [encode_with_images(tokenizer, prompt, num_query_tokens) for prompt in prompts]
    labels = [[IGNORE_INDEX] * len(sequence) for sequence in sequences]
    return pad(sequences, labels, tokenizer.eos_token_id, side="left")


def pad(sequences: list[list[int]], labels: list[list[int]], pad_id: int, side: str = "right") -> PaddedBatch:
    """Sequences (IMAGE_ID where image vectors belong) and their labels, padded to the longest."""
    length = max(map(len, sequences))

    def padded(rows, value):
        fill = [[value] * (length - len(row)) for row in rows]
        return torch.tensor([r + f if side == "right" else f + r for r, f in zip(rows, fill, strict=True)])

    ids = padded(sequences, pad_id)
    return PaddedBatch(
        input_ids=ids.masked_fill(ids == IMAGE_ID, 0),
        image_positions=(ids == IMAGE_ID).flatten().nonzero().flatten(),
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
