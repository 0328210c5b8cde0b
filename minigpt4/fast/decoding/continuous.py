"""Continuous batching: prompts are answered together, and each joins and leaves at any token.

All of them are rows of one KV cache, of which the first ones are active. A step computes one token of each active row.
Between two steps, rows leave and prompts join. A prompt is read in a cache of its own, a part at a time, so that the
active rows need not wait for all of it, and is then copied to a row.

A row that is left keeps its keys and values. A prompt that begins as that row does, such as the next turn of a
conversation, is read from the first new vector on.

On a GPU, a step is a CUDA graph, for a number of rows that is a power of two. Rows that fill it up write behind their
own tokens. The graphs are captured once, not for each prompt that joins.

B active rows, S sequence, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from minigpt4.fast.decoding.kv_cache import KVCache, common_prefix
from minigpt4.fast.decoding.loop import LONGEST_PREFILL, SHORTEST_PREFILL, Decoder, cache_length, warm_up_ids

PART = LONGEST_PREFILL  # vectors of a prompt that are read between two steps
SHORT_ROW = 640  # tokens of a row at the start, where memory is short; the cache grows when longer ones come


@dataclass(eq=False)
class Row:
    """A row of the cache: the vectors [S,D] whose keys it holds, and how many of them are the prompt."""

    content: torch.Tensor | None = None
    prompt_len: int = 0
    num_tokens: int = 0


class ContinuousBatch:
    """The rows of one language model. One thread uses it, in `torch.no_grad`.

    Attributes:
        active: number of active rows. They are the first ones, in the order in which they joined, but that the last one
            takes the place of one that leaves.
        logits: [B,V] float32 of the last step.
        decoder: computes the steps. Where it has graphs, `step` returns before its logits are computed.

    Args:
        max_rows: most active rows.
    """

    def __init__(self, llm, decoder: Decoder, max_rows: int):
        self.llm, self.decoder, self.active = llm, decoder, 0
        self._rows = [Row() for _ in range(max_rows)]  # those in no cache yet are empty
        device = llm.get_input_embeddings().weight.device
        self._cache, self._prompt_cache = KVCache(0, 0, device), KVCache(1, 0, device)
        self._first_rows: dict[int, KVCache] = {}
        self.logits = torch.empty(0)
        self._left: list[Row] = []  # the longest ago first

    def join(self, embeds: torch.Tensor, max_new_tokens: int) -> Iterator[torch.Tensor | None]:
        """Read a prompt [S,D]. Yields None while parts of it are left to be read, then its logits [1,V] float32.

        With the logits the row is active, as the last one. `set_ids` must be called for it before the next step. Raises
        OutOfMemoryError; the active rows are then as before.
        """
        length = len(embeds)
        if self._prompt_cache.length <= length:
            self._prompt_cache = KVCache(1, cache_length(length + 1), embeds.device)
        source, prefix_len = self._find_prefix(embeds)
        if prefix_len:
            if not self._prompt_cache.allocated:
                self._prompt_cache.grow(1, self._prompt_cache.length, like=self._cache)
            self._prompt_cache.copy_row(0, self._cache, self._rows.index(source), prefix_len)
        for start in range(prefix_len, length, PART):
            part = embeds[None, start : start + PART]
            logits = self.decoder.prefill(self.llm, self._prompt_cache, part, part.new_ones(part.shape[:2]), start)
            if start + PART < length:
                yield None
        self._make_room(length + max_new_tokens + 1)  # a token may be computed after the last one
        self._take_row(source, embeds)
        yield logits

    def _find_prefix(self, embeds: torch.Tensor) -> tuple[Row | None, int]:
        """The row that holds most of a prompt's beginning, and how many vectors; None, 0 if it is too little."""
        common = {row: common_prefix(row.content, embeds) for row in self._rows if row.content is not None}
        row = max(common, key=common.__getitem__, default=None)
        if row is None or 4 * common[row] < 3 * row.prompt_len:  # another conversation, which may go on
            return None, 0
        return row, common[row]

    def _make_room(self, length: int) -> None:
        """Make the cache large enough for one more active row of this many tokens."""
        # Two at least, so that two conversations can take turns.
        rows = min(max(2, 2 ** self.active.bit_length()), len(self._rows))
        if rows > self._cache.batch or length > self._cache.length:
            self._grow(max(rows, self._cache.batch), max(cache_length(length), self._cache.length))

    def _grow(self, rows: int, length: int) -> None:
        self._first_rows.clear()  # and their graphs
        self._cache.grow(rows, length, like=self._prompt_cache)

    def _take_row(self, source: Row | None, embeds: torch.Tensor) -> None:
        """Copy the prompt that was read to the first row that is not active, and make it active."""
        free = self._rows[self.active : self._cache.batch]
        unused = [row for row in free if row.content is None]
        # The row of the conversation that goes on, or an unused one, or the one that was left the longest ago.
        row = source if source in free else [*unused, *(row for row in self._left if row in free)][0]
        place = self._rows.index(row)
        if place != self.active:
            self._swap(place, self.active)
        if row in self._left:
            self._left.remove(row)
        row.content, row.prompt_len, row.num_tokens = embeds, len(embeds), len(embeds)
        self._cache.copy_row(self.active, self._prompt_cache, 0, len(embeds))
        self._cache.positions[self.active] = len(embeds)
        self.active += 1

    def set_ids(self, ids: torch.Tensor, first_row: int = 0) -> None:
        """Set the tokens [n] int64 of the rows from `first_row` on, which the next step continues."""
        self._cache.ids[first_row : first_row + len(ids)] = ids

    def read_ids(self) -> Callable[[], list[int]]:
        """Start to copy the tokens that were set to the host. Returns a function that waits for them alone."""
        read = self.decoder.start_copy(self._cache.ids[: self.active].clone())  # the next tokens overwrite them
        return lambda: read().tolist()

    def step(self) -> None:
        """Continue the tokens that were set. Sets `logits`, which the next step may overwrite."""
        rows = self._rows[: self.active]
        size = self.active
        if self.decoder.graphs:
            size = min(2 ** (size - 1).bit_length(), self._cache.batch)
        cache = self._first_rows.get(size)
        if cache is None:
            cache = self._first_rows[size] = self._cache.first_rows(size)
        kv_len = max(row.num_tokens for row in rows) + 1
        self.logits = self.decoder.step(self.llm, cache, kv_len)[: self.active]
        self._cache.pool = cache.pool  # of all graphs
        self._cache.positions[: self.active] += 1
        for row in rows:
            row.num_tokens += 1

    def leave(self, place: int, ids: list[int]) -> None:
        """End an active row, whose new tokens these are. The last active row, and its logits, take its place."""
        row, last = self._rows[place], self.active - 1
        if place != last:
            self._swap(place, last)
            if len(self.logits) == self.active:  # of the step that was just computed
                self.logits[place] = self.logits[last]
        self.logits = self.logits[:last]
        self.active = last
        new = torch.tensor(ids[: row.num_tokens - row.prompt_len], dtype=torch.long, device=row.content.device)
        answer = self.llm.get_input_embeddings()(new).to(row.content.dtype)
        row.content = torch.cat([row.content, answer])
        self._left.append(row)

    def warm_up(self, length: int) -> None:
        """On a GPU, allocate rows of `length` tokens, or shorter ones if memory is short, and capture all graphs."""
        if not self.decoder.graphs:
            return
        device, embedding = self._cache.ids.device, self.llm.get_input_embeddings()
        self._prompt_cache = KVCache(1, cache_length(length + 1), device)
        prompts = [2**n for n in range(SHORTEST_PREFILL.bit_length() - 1, LONGEST_PREFILL.bit_length())]
        # Each length is read twice: the second time its prefill is captured.
        for n in range(max(2 * len(prompts), len(self._rows))):
            ids = warm_up_ids(self.llm, n, min(prompts[n // 2 % len(prompts)], length - 2))
            for _ in self.join(embedding(ids), max_new_tokens=1):
                pass
            if n == 0:
                rows, cache = len(self._rows), self._prompt_cache
                needed = rows * sum(2 * layer.keys.nbytes for layer in cache.layers) * cache_length(length)
                short = needed / cache.length > torch.cuda.mem_get_info(device)[0] / 2
                self._grow(len(self._rows), cache_length(min(length, SHORT_ROW) if short else length))
            self.set_ids(ids[-1:], self.active - 1)
            self.step()
            if self.active == len(self._rows):
                self.leave(self.active - 1, [])
        for place in reversed(range(self.active)):
            self.leave(place, [])
        for row in self._rows:
            row.content, row.num_tokens = None, 0
        self._left.clear()

    def _swap(self, place: int, other: int) -> None:
        rows = self._rows
        length = max(rows[place].num_tokens, rows[other].num_tokens)
        rows[place], rows[other] = rows[other], rows[place]
        self._cache.swap_rows(place, other, length)
