"""Continuous batching: prompts are answered together, and each joins and leaves at any token.

All of them are rows of one KV cache. A step computes one token of each active row. Between two steps, rows leave and
prompts join. Prompts are read in a cache of their own, several short ones at once and a long one part by part, so that
the active rows need not wait for all of it, and are then copied to free rows.

A row that is left keeps its keys and values. A prompt that begins as that row does, such as the next turn of a
conversation, is read from the first new vector on.

On a GPU, a step is a CUDA graph, for a number of rows that is a power of two. Free rows among them write behind their
own tokens. The graphs are captured once, not for each prompt that joins.

N active rows, S sequence, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from minigpt4.fast.decoding.kv_cache import KVCache, common_prefix
from minigpt4.fast.decoding.loop import LONGEST_PREFILL, SHORTEST_PREFILL, Decoder, cache_length, warm_up_ids

PART = LONGEST_PREFILL  # vectors of prompts that are read between two steps
SHORT_ROW = 640  # tokens of a row at the start, where memory is short; the cache grows when longer ones come
PROBES = 8  # vectors of a prompt that are compared first


class NewRow(NamedTuple):
    """A prompt that is to become an active row."""

    owner: Any
    """Identifies the row, as in `ContinuousBatch.owners`."""
    embeds: torch.Tensor
    """[S,D]"""
    max_new_tokens: int


@dataclass(eq=False)
class Row:
    """A row of the cache."""

    owner: Any = None
    """None: the row is free."""
    content: torch.Tensor | None = None
    """[S,D]: the vectors whose keys it holds. Those of an active row's answer are missing until it leaves."""
    prompt_len: int = 0
    num_tokens: int = 0
    """Positions that have been written."""

    @property
    def least_common(self) -> int:
        """How many vectors a prompt must share with the row's; a row that shares fewer belongs to another conversation,
        which may go on."""
        return -(-3 * self.prompt_len // 4)


class ContinuousBatch:
    """The rows of one language model. One thread uses it, in `torch.no_grad`.

    Attributes:
        decoder: computes the steps. Where it has graphs, `step` returns before its logits are computed.

    Args:
        max_rows: most active rows.
    """

    def __init__(self, llm, decoder: Decoder, max_rows: int):
        self.llm, self.decoder = llm, decoder
        self._rows = [Row() for _ in range(max_rows)]  # those in no cache yet are empty
        device = llm.get_input_embeddings().weight.device
        self._cache, self._prompt_cache = KVCache(0, 0, device), KVCache(1, 0, device)
        self._first_rows: dict[int, KVCache] = {}
        self._logits = torch.empty(0)  # of the rows that the last step computed
        self._left: list[Row] = []  # the longest ago first
        self._indexed: list[int] = []  # the places that `_index` was made of
        self._index_of_active: slice | torch.Tensor = slice(0, 0)

    @property
    def owners(self) -> list[Any]:
        """Those of the active rows. Ids and logits have this order."""
        return [row.owner for row in self._rows if row.owner is not None]

    @property
    def logits(self) -> torch.Tensor:
        """[N,V] float32 of the last step, of the rows that are active still. The next step may overwrite them."""
        return self._logits[self._index()]

    def join(
        self, waiting: list[NewRow], choose: Callable[[list[Any], torch.Tensor], torch.Tensor]
    ) -> Iterator[list[Any]]:
        """Read prompts, short ones together. Yields at least after each PART vectors.

        Yields the owners whose rows are active from then on: none while parts of a prompt are left to be read. Raises
        OutOfMemoryError, and what `choose` raises; the active rows, and those that were yielded, are then as before.

        Args:
            waiting: the prompts. They are taken out of this list when they are read; one that is removed is not read.
            choose: returns the first tokens [n] int64 for owners and their logits [n,V] float32.
        """
        while waiting:
            source, prefix_len = self._find_prefix(waiting[0].embeds)
            group = self._take_group(waiting, alone=source is not None)
            if len(group) > 1:
                cache, logits = self._read_together([prompt.embeds for prompt in group])
            else:
                embeds = group[0].embeds
                cache = self._prompt_cache_for(len(embeds), source, prefix_len)
                for start in range(prefix_len, len(embeds), PART):
                    part = embeds[None, start : start + PART]
                    logits = self.decoder.prefill(self.llm, cache, part, part.new_ones(part.shape[:2]), start)
                    if start + PART < len(embeds):
                        yield []
            # A token may be computed after the last one.
            length = max(len(prompt.embeds) + prompt.max_new_tokens for prompt in group) + 1
            self._make_room(len(group), length, like=cache)
            owners = [prompt.owner for prompt in group]
            ids = choose(owners, logits)  # before a row is active, since it may fail
            for number, prompt in enumerate(group):
                place = self._take_row(prompt, source, cache, number)
                self._cache.ids[place] = ids[number]
            yield owners

    def _take_group(self, waiting: list[NewRow], alone: bool) -> list[NewRow]:
        """Take the prompts that are read next: the first one, and those after it that can be read with it."""
        group = [waiting.pop(0)]
        while waiting and not alone:
            longest = max(len(prompt.embeds) for prompt in (*group, waiting[0]))
            if (len(group) + 1) * longest > PART or self._find_prefix(waiting[0].embeds)[1]:
                break
            group.append(waiting.pop(0))
        return group

    def _read_together(self, prompts: list[torch.Tensor]) -> tuple[KVCache, torch.Tensor]:
        """Read prompts [S,D]. Returns a cache with a row for each, and their logits [n,V]."""
        longest, device = max(map(len, prompts)), prompts[0].device
        missing = torch.tensor([longest - len(embeds) for embeds in prompts])
        padded = [nn.functional.pad(embeds, (0, 0, longest - len(embeds), 0)) for embeds in prompts]
        mask = (torch.arange(longest) >= missing.unsqueeze(1)).long().to(device)
        cache = KVCache(len(prompts), longest + 1, device)  # padding is written to the last place
        return cache, self.decoder.prefill(self.llm, cache, torch.stack(padded), mask, 0)

    def _find_prefix(self, embeds: torch.Tensor) -> tuple[Row | None, int]:
        """The row that holds most of a prompt's beginning, and how many vectors; None, 0 if it is too little."""
        common = {row: common_prefix(row.content, embeds) for row in self._alike(embeds)}
        row = max(common, key=common.__getitem__, default=None)
        return (row, common[row]) if row and common[row] >= row.least_common else (None, 0)

    def _alike(self, embeds: torch.Tensor) -> list[Row]:
        """The rows that may begin as a prompt does. PROBES vectors of each are compared, with one wait for the GPU."""
        rows = [row for row in self._rows if row.content is not None and row.least_common < len(embeds)]
        long = [row for row in rows if row.least_common >= PROBES]
        if long:
            steps = [row.least_common // PROBES for row in long]
            probes = [row.content[: PROBES * step : step] for row, step in zip(long, steps, strict=True)]
            places = (torch.arange(PROBES) * torch.tensor(steps).unsqueeze(1)).to(embeds.device)
            same = (torch.stack(probes) == embeds[places]).flatten(1).all(dim=1).tolist()
            long = [row for row, is_same in zip(long, same, strict=True) if is_same]
        return [row for row in rows if row.least_common < PROBES] + long

    def _prompt_cache_for(self, length: int, source: Row | None, prefix_len: int) -> KVCache:
        """The cache for a single prompt, with the first vectors of a row."""
        # Where memory was short, only some layers are allocated.
        is_incomplete = self._prompt_cache.layers and not self._prompt_cache.allocated
        if self._prompt_cache.length <= length or is_incomplete:
            longer = max(cache_length(length + 1), self._prompt_cache.length)
            self._prompt_cache = KVCache(1, longer, self._prompt_cache.ids.device)
        if prefix_len:
            if not self._prompt_cache.allocated:
                self._prompt_cache.grow(1, self._prompt_cache.length, like=self._cache)
            self._prompt_cache.copy_row(0, self._cache, self._rows.index(source), prefix_len)
        return self._prompt_cache

    def _make_room(self, count: int, length: int, like: KVCache) -> None:
        """Make the cache large enough for more active rows of at most this many tokens."""
        # Two at least, so that two conversations can take turns.
        active = len(self._active()) + count
        rows = min(max(2, 2 ** (active - 1).bit_length()), len(self._rows))
        if rows > self._cache.batch or length > self._cache.length:
            self._grow(max(rows, self._cache.batch), max(cache_length(length), self._cache.length), like)

    def _grow(self, rows: int, length: int, like: KVCache) -> None:
        self._first_rows.clear()  # and their graphs
        self._cache.grow(rows, length, like)

    def _take_row(self, prompt: NewRow, source: Row | None, cache: KVCache, number: int) -> int:
        """Copy the prompt in a row of `cache` to a free row, which is active then. Returns the place of this row."""
        free = [row for row in self._rows[: self._cache.batch] if row.owner is None]
        unused = [row for row in free if row.content is None]
        # The row of the conversation that goes on, or an unused one, or the one that was left the longest ago.
        row = source if source in free else [*unused, *(row for row in self._left if row in free)][0]
        if row in self._left:
            self._left.remove(row)
        row.owner, row.content = prompt.owner, prompt.embeds
        row.prompt_len = row.num_tokens = len(prompt.embeds)
        place = self._rows.index(row)
        self._cache.copy_row(place, cache, number, row.num_tokens)
        self._cache.positions[place] = row.num_tokens
        return place

    def set_ids(self, ids: torch.Tensor) -> None:
        """Set the tokens [N] int64 of the active rows, which the next step continues."""
        self._cache.ids[self._index()] = ids

    def read_ids(self) -> Callable[[], list[int]]:
        """Start to copy the tokens that were set to the host. Returns a function that waits for them alone."""
        read = self.decoder.start_copy(self._cache.ids[self._index()].clone())  # the next tokens overwrite them
        return lambda: read().tolist()

    def step(self) -> None:
        """Continue the tokens that were set. Sets `logits`, which the next step may overwrite."""
        self._compact()
        rows = [row for row in self._rows if row.owner is not None]
        size = self._computed(self._active()[-1] + 1)
        cache = self._first_rows.get(size)
        if cache is None:
            cache = self._first_rows[size] = self._cache.first_rows(size)
        kv_len = max(row.num_tokens for row in rows) + 1
        self._logits = self.decoder.step(self.llm, cache, kv_len)
        self._cache.pool = cache.pool  # of all graphs
        self._cache.positions[self._index()] += 1
        for row in rows:
            row.num_tokens += 1

    def leave(self, owner: Any, ids: list[int]) -> None:
        """End an active row. `ids` are its tokens since it joined."""
        row = next(row for row in self._rows if row.owner == owner)
        new = torch.tensor(ids[: row.num_tokens - row.prompt_len], dtype=torch.long, device=row.content.device)
        answer = self.llm.get_input_embeddings()(new).to(row.content.dtype)
        row.owner, row.content = None, torch.cat([row.content, answer])
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
            for _ in self.join([NewRow(n, embedding(ids), max_new_tokens=1)], lambda _, logits: logits.argmax(dim=-1)):
                pass
            if n == 0:
                rows, cache = len(self._rows), self._prompt_cache
                needed = rows * sum(2 * layer.keys.nbytes for layer in cache.layers) * cache_length(length)
                short = needed / cache.length > torch.cuda.mem_get_info(device)[0] / 2
                self._grow(len(self._rows), cache_length(min(length, SHORT_ROW) if short else length), like=cache)
            self.step()
            if len(self.owners) == len(self._rows):
                self.leave(n, [])
        for owner in self.owners:
            self.leave(owner, [])
        for row in self._rows:
            row.content, row.num_tokens = None, 0
        self._left.clear()

    def _active(self) -> list[int]:
        """The places of the active rows."""
        return [place for place, row in enumerate(self._rows) if row.owner is not None]

    def _index(self) -> slice | torch.Tensor:
        """The active rows, as an index."""
        places = self._active()
        if places != self._indexed:
            self._indexed, self._index_of_active = places, slice(0, len(places))
            if places != [*range(len(places))]:
                self._index_of_active = torch.tensor(places, device=self._cache.ids.device)
        return self._index_of_active

    def _computed(self, rows: int) -> int:
        """How many rows a step computes that has to compute the first `rows`."""
        return min(2 ** (rows - 1).bit_length(), self._cache.batch) if self.decoder.graphs else rows

    def _compact(self) -> None:
        """Move active rows forward, if fewer are to be computed then."""
        active = self._active()
        enough = self._computed(len(active))
        free = [place for place in range(enough) if self._rows[place].owner is None]
        for place, other in zip([place for place in active if place >= enough], free, strict=False):
            rows = self._rows
            length = max(rows[place].num_tokens, rows[other].num_tokens)
            rows[place], rows[other] = rows[other], rows[place]
            self._cache.swap_rows(place, other, length)
