"""The cache of the decoding loop (`decoder.py`): a fixed number of slots, each for the keys and values of one token.

Slot n of a row belongs to its n-th token, whatever padding stood before it, so a slot is a position: what a token may
see are the slots up to its own.

B batch, S sequence, R reach (how many slots a mask looks at), L slots, H heads, D width.
"""

import torch
from torch import nn


class KVCache:
    """The cache of one batch, and the step that reads and fills it; transformers' models call its `update`.

    Args:
        batch: rows (B).
        length: slots of a row (L).
    """

    def __init__(self, batch: int, length: int, device: torch.device):
        self.batch, self.length = batch, length
        self.layers: list[LayerKVCache] = []
        self.graph: tuple[torch.cuda.CUDAGraph, torch.Tensor] | None = None  # of a step, and its logits
        self.readings: dict[int, tuple | None] = {}  # by vectors; None: met once, not recorded yet
        self.pool: tuple[int, int] | None = None  # memory that all graphs share: none runs beside another
        self.content: torch.Tensor | None = None  # [S,D]: what a single row was made of, its answer too
        self.asked = 0  # the length of its prompt
        self.ids = torch.zeros(batch, dtype=torch.long, device=device)
        self.positions = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self._rows = torch.arange(batch, device=device).unsqueeze(1)

    def read(
        self, llm, embeds: torch.Tensor, attention_mask: torch.Tensor, known: int, reach: int | None = None
    ) -> torch.Tensor:
        """Fill the slots after the first `known` with [B,S,D], padded on the left. Returns logits [B,V].

        reach: how many slots the mask has; None: one more than there are tokens.
        """
        if not self.layers:
            self.layers = [LayerKVCache(self.length) for _ in range(llm.config.get_text_config().num_hidden_layers)]
        return self.fill(llm, embeds, self.find(attention_mask, known), reach or known + embeds.shape[1] + 1)

    def find(self, attention_mask: torch.Tensor, known: int) -> torch.Tensor:
        """Positions [B,S] of what follows the first `known` tokens, below 0 on padding; the next step starts there."""
        positions = attention_mask.cumsum(1, dtype=torch.long) - 1 + known
        self.positions.copy_(positions[:, -1:])
        return positions.masked_fill(attention_mask == 0, -1)

    def advance(self, ids: torch.Tensor) -> None:
        """Set the next tokens, of all rows but those that fill up the batch."""
        self.ids[: len(ids)].copy_(ids)
        self.positions += 1

    def step(self, llm, reach: int | None) -> torch.Tensor:
        """Logits [B,V] float32 after the tokens that were set, which see the slots up to their own.

        reach: how many slots the mask has; None: in compiled layers, whose attention is told what each row sees.
        """
        return self.fill(llm, llm.get_input_embeddings()(self.ids.unsqueeze(1)), self.positions, reach)

    def fill(self, llm, embeds: torch.Tensor, positions: torch.Tensor, reach: int | None) -> torch.Tensor:
        """Logits [B,V] float32 after embeddings [B,S,D] at positions [B,S], which they fill.

        Padding, below 0, goes into the last slot in reach, which the token that belongs there overwrites.
        """
        slots = positions if reach is None else positions.masked_fill(positions < 0, reach - 1)
        for layer in self.layers:
            layer.aim(self._rows, slots, reach)
        positions = positions.clamp(min=0)  # padding sees slot 0: a row that sees nothing would be NaN
        logits = llm(
            inputs_embeds=embeds,
            position_ids=positions,
            past_key_values=self,
            use_cache=True,
            logits_to_keep=1,
            **(_seen(positions) if reach is None else _mask(positions, reach, embeds.dtype)),
        ).logits
        return logits[:, -1].float()

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Write the keys and values [B,H,S,D] of new tokens. Returns those of all slots in reach [B,H,R,D]."""
        return self.layers[layer_idx].update(keys, values)

    def shared(self, embeds: torch.Tensor) -> int:
        """How many of the first slots hold the beginning of [1,S,D]; at least one vector is left to be read."""
        if self.content is None:
            return 0
        n = min(len(self.content), embeds.shape[1] - 1)
        return int((self.content[:n] == embeds[0, :n]).all(dim=1).cumprod(0).sum())

    def copy(self, other: "KVCache", known: int) -> None:
        """Take over the first `known` slots of another cache."""
        self.layers = [layer.copy(self.length, known) for layer in other.layers]


class LayerKVCache:
    """Keys and values [B,L,H,D] of one layer; allocated with the first ones that come."""

    def __init__(self, length: int):
        self.length = length
        self.keys = self.values = self.seen_keys = self.seen_values = None

    def aim(self, rows: torch.Tensor, slots: torch.Tensor, reach: int | None) -> None:
        """Say where the next update writes, rows [B,1] and slots [B,S], and how many slots it returns; None: all."""
        self.rows, self.slots, self.reach = rows, slots, reach
        if reach is None:  # not as views: compiled layers know these tensors
            self.seen_keys, self.seen_values = self.keys, self.values
        elif self.keys is not None:
            self.seen_keys, self.seen_values = self.keys[:, :reach], self.values[:, :reach]

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if self.seen_keys is None:  # zeros, since even what is masked must be a number
            self.keys, self.values = (new.new_zeros(len(new), self.length, *new.shape[2:]) for new in (keys, values))
            self.aim(self.rows, self.slots, self.reach)
        self.seen_keys[self.rows, self.slots] = keys
        self.seen_values[self.rows, self.slots] = values
        return self.seen_keys.transpose(1, 2), self.seen_values.transpose(1, 2)

    def copy(self, length: int, known: int) -> "LayerKVCache":
        copied = LayerKVCache(length)
        copied.keys, copied.values = (
            nn.functional.pad(old[:, :known], (0, 0, 0, 0, 0, length - known)) for old in (self.keys, self.values)
        )
        return copied


def _seen(positions: torch.Tensor) -> dict:
    """What attention is told of steps at positions [B,1] in compiled layers; see `decoding_layers.attend`."""
    seen = positions[:, 0] + 1
    # transformers takes a mask of four dimensions as it is; this attention does not look at it.
    return {"seen": seen, "attention_mask": seen.view(-1, 1, 1, 1)}


def _mask(positions: torch.Tensor, reach: int, dtype: torch.dtype) -> dict:
    """A mask [B,1,S,R] that shows to positions [B,S] the slots up to their own."""
    unseen = torch.arange(reach, device=positions.device) > positions.unsqueeze(-1)  # [B,S,R]
    mask = torch.zeros(unseen.shape, dtype=dtype, device=positions.device)
    return {"attention_mask": mask.masked_fill(unseen, torch.finfo(dtype).min).unsqueeze(1)}
