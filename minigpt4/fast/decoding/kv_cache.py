"""The KV cache of the decoding loop (`loop.py`): a fixed number of positions, each with one token's keys and values.

Position n of a row belongs to its n-th token, whatever padding stood before it. A token sees the positions up to its
own.

B batch, S sequence, R visible positions (the length of the mask), L positions in all, H heads, D width.
"""

import torch
from torch import nn


class KVCache:
    """The cache of one batch, and the step that reads and fills it. transformers' models call its `update`.

    Args:
        batch: rows (B).
        length: positions of a row (L).
    """

    def __init__(self, batch: int, length: int, device: torch.device):
        self.batch, self.length = batch, length
        self.layers: list[LayerKVCache] = []
        self.step_graph: tuple[torch.cuda.CUDAGraph, torch.Tensor] | None = None  # and its logits
        self.prefill_graphs: dict[int, tuple | None] = {}  # by number of tokens; None: seen once, not captured yet
        self.pool: tuple[int, int] | None = None  # memory of all graphs, of which only one runs at a time
        self.content: torch.Tensor | None = None  # [S,D]: prompt and answer of a single row, whose keys are kept here
        self.prompt_len = 0
        self.ids = torch.zeros(batch, dtype=torch.long, device=device)
        self.positions = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self._rows = torch.arange(batch, device=device).unsqueeze(1)

    @property
    def allocated(self) -> bool:
        """Whether every layer has its keys and values. They come with the first prefill, unless that fails."""
        return bool(self.layers) and all(layer.keys is not None for layer in self.layers)

    def prefill(
        self, llm, embeds: torch.Tensor, attention_mask: torch.Tensor, prefix_len: int, kv_len: int | None = None
    ) -> torch.Tensor:
        """Read embeddings [B,S,D], padded on the left, behind the first `prefix_len` tokens. Returns logits [B,V].

        kv_len: length of the mask; None: one more than there are tokens.
        """
        if not self.layers:
            self.layers = [LayerKVCache(self.length) for _ in range(llm.config.get_text_config().num_hidden_layers)]
        positions = self.new_positions(attention_mask, prefix_len)
        return self.forward(llm, embeds, positions, kv_len or prefix_len + embeds.shape[1] + 1)

    def new_positions(self, attention_mask: torch.Tensor, prefix_len: int) -> torch.Tensor:
        """Positions [B,S] of tokens behind the first `prefix_len`, below 0 on padding. The next step goes on there."""
        positions = attention_mask.cumsum(1, dtype=torch.long) - 1 + prefix_len
        self.positions.copy_(positions[:, -1:])
        return positions.masked_fill(attention_mask == 0, -1)

    def advance(self, ids: torch.Tensor) -> None:
        """Set the next tokens of all rows, except those that fill up the batch."""
        self.ids[: len(ids)].copy_(ids)
        self.positions += 1

    def step(self, llm, kv_len: int | None) -> torch.Tensor:
        """Logits [B,V] float32 after the tokens that `advance` set.

        kv_len: length of the mask; None: in compiled layers, whose attention gets the number of visible positions.
        """
        return self.forward(llm, llm.get_input_embeddings()(self.ids.unsqueeze(1)), self.positions, kv_len)

    def forward(self, llm, embeds: torch.Tensor, positions: torch.Tensor, kv_len: int | None) -> torch.Tensor:
        """Logits [B,V] float32 after embeddings [B,S,D] at positions [B,S]; their keys and values are written there.

        Padding tokens (position < 0) are written to the last visible cache position, which the next real token
        overwrites.
        """
        cache_positions = positions if kv_len is None else positions.masked_fill(positions < 0, kv_len - 1)
        for layer in self.layers:
            layer.set_positions(self._rows, cache_positions, kv_len)
        positions = positions.clamp(min=0)  # padding sees position 0: a row that sees nothing would be NaN
        logits = llm(
            inputs_embeds=embeds,
            position_ids=positions,
            past_key_values=self,
            use_cache=True,
            logits_to_keep=1,
            **(_visible_lengths(positions) if kv_len is None else _mask(positions, kv_len, embeds.dtype)),
        ).logits
        return logits[:, -1].float()

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *args, **kwargs):
        """Write the keys and values [B,H,S,D] of new tokens. Returns those of all visible positions [B,H,R,D]."""
        return self.layers[layer_idx].update(keys, values)

    def grow(self, batch: int, length: int, like: "KVCache") -> None:
        """Make room for more rows and positions, with heads as those of another cache. The graphs go.

        Where memory is short, OutOfMemoryError leaves what the cache holds, and its size, as they are.
        """
        self.step_graph = None
        self.layers = self.layers or [LayerKVCache(0) for _ in like.layers]
        for layer, other in zip(self.layers, like.layers, strict=True):
            layer.grow(batch, length, other)
        self.ids = nn.functional.pad(self.ids, (0, batch - self.batch))
        self.positions = nn.functional.pad(self.positions, (0, 0, 0, batch - self.batch))
        self.batch, self.length = batch, length

    def first_rows(self, count: int) -> "KVCache":
        """A cache of the first rows, which shares its memory with this one."""
        rows = KVCache(count, self.length, self.ids.device)
        rows.layers = [layer.first_rows(count) for layer in self.layers]
        rows.ids, rows.positions, rows.pool = self.ids[:count], self.positions[:count], self.pool
        return rows

    def copy_row(self, row: int, other: "KVCache", other_row: int, length: int) -> None:
        """Copy the first `length` positions of a row of another cache into a row of this one."""
        for layer, source in zip(self.layers, other.layers, strict=True):
            layer.keys[row, :length] = source.keys[other_row, :length]
            layer.values[row, :length] = source.values[other_row, :length]

    def swap_rows(self, row: int, other_row: int, length: int) -> None:
        """Exchange the first `length` positions of two rows, and their next tokens."""
        pair = torch.tensor([row, other_row], device=self.ids.device)
        for layer in self.layers:
            for cached in (layer.keys, layer.values):
                cached[pair, :length] = cached[pair.flip(0), :length]
        for state in (self.ids, self.positions):
            state[pair] = state[pair.flip(0)]


def common_prefix(content: torch.Tensor | None, embeds: torch.Tensor) -> int:
    """How many vectors at the beginning of [S,D] and [S,D] are the same; at least one of the second is left over."""
    if content is None:
        return 0
    n = min(len(content), len(embeds) - 1)
    return int((content[:n] == embeds[:n]).all(dim=1).cumprod(0).sum())


class LayerKVCache:
    """Keys and values [B,L,H,D] of one layer; allocated with the first ones that come."""

    def __init__(self, length: int):
        self.length = length
        self.keys = self.values = self.visible_keys = self.visible_values = None

    def set_positions(self, rows: torch.Tensor, positions: torch.Tensor, kv_len: int | None) -> None:
        """Set where the next update writes, rows [B,1] and positions [B,S], and how many positions it returns.

        kv_len: None: all.
        """
        self.rows, self.positions, self.kv_len = rows, positions, kv_len
        if kv_len is None:  # the tensors themselves, not views: compiled layers know them
            self.visible_keys, self.visible_values = self.keys, self.values
        elif self.keys is not None:
            self.visible_keys, self.visible_values = self.keys[:, :kv_len], self.values[:, :kv_len]

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if self.visible_keys is None:  # zeros, since even masked positions must hold numbers
            self.keys, self.values = (new.new_zeros(len(new), self.length, *new.shape[2:]) for new in (keys, values))
            self.set_positions(self.rows, self.positions, self.kv_len)
        self.visible_keys[self.rows, self.positions] = keys
        self.visible_values[self.rows, self.positions] = values
        return self.visible_keys.transpose(1, 2), self.visible_values.transpose(1, 2)

    def grow(self, batch: int, length: int, like: "LayerKVCache") -> None:
        if self.keys is not None:  # larger than the others where memory was short before
            batch, length = max(batch, len(self.keys)), max(length, self.keys.shape[1])
        grown = [cached.new_zeros(batch, length, *cached.shape[2:]) for cached in (like.keys, like.values)]
        if self.keys is not None:
            for new, old in zip(grown, (self.keys, self.values), strict=True):
                new[: len(old), : old.shape[1]] = old
        self.keys, self.values = grown
        self.length = length

    def first_rows(self, count: int) -> "LayerKVCache":
        rows = LayerKVCache(self.length)
        rows.keys, rows.values = self.keys[:count], self.values[:count]
        return rows


def _visible_lengths(positions: torch.Tensor) -> dict:
    """The arguments that compiled layers' attention takes for steps at positions [B,1] (`compiled_layers.attend`)."""
    lengths = positions[:, 0] + 1
    # transformers passes a mask of four dimensions on unchanged; this attention ignores it.
    return {"visible": lengths, "attention_mask": lengths.view(-1, 1, 1, 1)}


def _mask(positions: torch.Tensor, kv_len: int, dtype: torch.dtype) -> dict:
    """A mask [B,1,S,R] that shows to positions [B,S] the cache positions up to their own."""
    hidden = torch.arange(kv_len, device=positions.device) > positions.unsqueeze(-1)  # [B,S,R]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=positions.device)
    return {"attention_mask": mask.masked_fill(hidden, torch.finfo(dtype).min).unsqueeze(1)}
