"""The decoding loop: a KV cache of fixed size, one CUDA graph a step on a GPU, and prompts that are read once.

On a GPU the layers are compiled (`compiled_layers.py`), and a step is captured once for each cache, then replayed. The
prefill of a single prompt is captured too, padded to one of a few lengths. On other devices, and with bitsandbytes' own
layers, both run eagerly.

After an answer to a single prompt its cache is kept. The next prompt that begins with the same vectors, such as the
next turn of a conversation, is read from the first new vector on.

B batch, S sequence, D width.
"""

import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing

import torch
from torch import nn

from minigpt4.common import compat
from minigpt4.fast.attention import ATTENTION
from minigpt4.fast.cuda_graphs import CAPTURE_LOCK, capturing
from minigpt4.fast.decoding.compiled_layers import compiled_copy
from minigpt4.fast.decoding.kv_cache import KVCache, common_prefix
from minigpt4.fast.self_check import EXACT_TOLERANCE, STEP_TOLERANCE, decodes_like_the_library, largest_difference
from minigpt4.quantization.bitsandbytes import has_bitsandbytes_layers

# Caches kept between answers: those of the last two conversations or batches.
MAX_IDLE_CACHES = 2
# Lengths of a captured prefill are powers of two. Below the shorter one the weights alone take the time; above the
# longer one launches from the host cost nothing.
SHORTEST_PREFILL, LONGEST_PREFILL = 64, 512

# One thread compiles and captures at a time.
_capturing = threading.Lock()


class CachedDecoding:
    """The decoding loop for any number of language models, with a `Decoder` for each that is in use.

    `models/generation.py` takes it as its `decoding_loop`. Threads may use it side by side.
    """

    def __init__(self, graphs: bool | None = None) -> None:
        """graphs: as for `Decoder`."""
        self._graphs = graphs
        self.decoders: weakref.WeakKeyDictionary[nn.Module, Decoder] = weakref.WeakKeyDictionary()
        self._checked: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    def supports(self, llm) -> bool:
        """Whether the loop can run a model, and does so with the same numbers as transformers."""
        if not has_supported_layers(llm):
            return False
        with self._lock:
            if llm not in self._checked:
                self._checked[llm] = decodes_like_the_library(llm, KVCache)
            return self._checked[llm]

    def decode(
        self, llm, embeds: torch.Tensor, attention_mask: torch.Tensor, steps: int, choose: Callable
    ) -> Iterator[torch.Tensor]:
        """Yield the next token of every row, [B] int64 on the CPU, `steps` times or until closed. Needs `no_grad`.

        On a GPU the next step runs while the caller looks at a token.

        Args:
            llm: a causal language model of transformers that the loop `supports`.
            embeds: [B,S,D], padded on the left.
            attention_mask: [B,S], 0 on padding.
            choose: from the ids so far [B,T] and the logits [B,V] float32 to the next ids [B].
        """
        return self.decoder(llm).run(llm, embeds, attention_mask, steps, choose)

    def decoder(self, llm) -> "Decoder":
        """The loop of a model in its present place and state."""
        with self._lock:
            decoder = self.decoders.get(llm)
            if decoder is None or decoder.weights != _fingerprint(llm):
                decoder = self.decoders[llm] = Decoder(llm, self._graphs)
        return decoder

    def clear_cache(self, llm) -> None:
        """Free the caches and graphs of a model; the next answer makes new ones."""
        self.decoders.pop(llm, None)

    @torch.inference_mode(False)
    @torch.no_grad()
    def warm_up(self, llm, prompt_len: int = 100, answer_len: int = 300) -> None:
        """On a GPU, compile and capture for answers of such lengths in tokens; the first answer would wait for it."""
        if not self.supports(llm) or not Decoder(llm).graphs:
            return
        logging.info("Compiling the language model for answers: some fifteen seconds at first, fewer later on.")
        # Each length is read twice: the second time its prefill is captured.
        lengths = (prompt_len, prompt_len, SHORTEST_PREFILL, SHORTEST_PREFILL)

        def greedy(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            return logits.argmax(dim=-1)

        for number, length in enumerate(lengths):
            ids = warm_up_ids(llm, number, length).unsqueeze(0)
            embeds = llm.get_input_embeddings()(ids)
            steps = max(prompt_len + answer_len - length, 1)
            with closing(self.decode(llm, embeds, torch.ones_like(ids), steps, greedy)) as run:
                next(run)
            for cache in self.decoders[llm].idle:  # any prompt may take it
                cache.prompt_len = 0


cached_decoding = CachedDecoding()
"""The one that commands, page and endpoint use."""


def has_supported_layers(llm) -> bool:
    """Whether a model is of the kind that the loop can run.

    It must be on one device, every token must see all earlier ones, and positions must be rotations (RoPE).
    """
    config = llm.config.get_text_config()
    rotary = getattr(getattr(llm, "base_model", None), "rotary_emb", None)
    return (
        getattr(rotary, "rope_type", "dynamic") in ("default", "linear", "yarn", "llama3")
        and compat.attention_implementation(config).removeprefix(f"{ATTENTION}_") in ("sdpa", "eager")
        and compat.attends_to_all_before(config)
        and len(set(getattr(llm, "hf_device_map", {}).values())) <= 1
    )


def warm_up_ids(llm, number: int, length: int) -> torch.Tensor:
    """The ids [length] of a warm-up's prompt. It begins unlike those of other numbers, or nothing would be read.

    They differ, so that not all are padding tokens, whose embedding may be zero: compiled steps are to be compared.
    """
    return torch.arange(number, number + length, device=llm.device) % llm.get_input_embeddings().num_embeddings


def cache_length(tokens: int) -> int:
    """The least of 128, 160, 192, 224, 256, 320, 384, 448, 512 … that holds `tokens`."""
    sizes = (quarters * 2**n for n in itertools.count(5) for quarters in (4, 5, 6, 7))
    return next(size for size in sizes if size >= tokens)


class Decoder:
    """The loop of one language model, and the caches that it keeps. Threads may run it side by side."""

    def __init__(self, llm, graphs: bool | None = None, compiled: bool = True):
        """graphs: capture CUDA graphs; None: where they can be had. compiled: the layers in the graph of a step."""
        on_gpu = next(llm.parameters()).device.type == "cuda"
        self.graphs = on_gpu and not has_bitsandbytes_layers(llm) if graphs is None else graphs
        # Compiled layers have an attention of their own, which not every model would call.
        self.compiled = compiled and compat.calls_registered_attention(llm)
        self.captures_prefill = True
        self.weights = _fingerprint(llm)
        self.idle: list[KVCache] = []  # the most recently used one is the last
        self._compiled_llm: nn.Module | None = None
        self._lock = threading.Lock()

    def run(
        self, llm, embeds: torch.Tensor, attention_mask: torch.Tensor, steps: int, choose: Callable
    ) -> Iterator[torch.Tensor]:
        """See `CachedDecoding.decode`."""
        rows = len(embeds)
        if rows == 1:
            embeds = embeds[:, attention_mask[0].bool()]
            attention_mask = attention_mask.new_ones(embeds.shape[:2])
        elif self.graphs:  # powers of two limit the number of graphs
            missing = 2 ** (rows - 1).bit_length() - rows
            embeds = nn.functional.pad(embeds, (0, 0, 0, 0, 0, missing))
            attention_mask = nn.functional.pad(attention_mask, (0, 0, 0, missing))
        prompt_len = embeds.shape[1]
        history = torch.zeros(rows, steps, dtype=torch.long, device=embeds.device)
        cache, prefix_len = self._take_cache(embeds, prompt_len + steps)
        written, content = 0, None
        try:
            logits = self.prefill(llm, cache, embeds[:, prefix_len:], attention_mask[:, prefix_len:], prefix_len)
            content = embeds[0]
            for n in range(steps):
                with CAPTURE_LOCK:  # torch's random numbers belong to a graph while it is captured
                    history[:, n] = ids = choose(history[:, :n], logits[:rows])
                read_ids = self.start_copy(ids)
                if not self.graphs:
                    yield read_ids()
                if n + 1 < steps:
                    cache.advance(ids)
                    logits = self.step(llm, cache, prompt_len + n + 1)
                    written += 1
                if self.graphs:
                    yield read_ids()
        finally:
            if rows == 1 and content is not None:
                answer = llm.get_input_embeddings()(history[0, :written]).to(content.dtype)
                cache.content, cache.prompt_len = torch.cat([content, answer]), prompt_len
            with self._lock:
                self.idle = [*self.idle, cache][-MAX_IDLE_CACHES:]

    def start_copy(self, ids: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start to copy ids to the host. Returns a function that waits for the copy, and for no step after it."""
        return _start_copy(ids) if self.graphs else ids.cpu

    def _take_cache(self, embeds: torch.Tensor, length: int) -> tuple[KVCache, int]:
        """A cache for a batch, and how many of its positions hold the batch's beginning already."""
        with self._lock:
            candidates = [cache for cache in self.idle if cache.batch == len(embeds)]
            common = {cache: common_prefix(cache.content, embeds[0]) for cache in candidates}
            cache = max(candidates, key=common.__getitem__, default=None)
            # A cache that shares only its beginning with the prompt belongs to another conversation, which may go on.
            if cache and 4 * common[cache] < 3 * cache.prompt_len:
                cache = candidates[0] if len(self.idle) >= MAX_IDLE_CACHES else None
            if cache:
                self.idle.remove(cache)
            else:
                self.idle = self.idle[1 - MAX_IDLE_CACHES :]
        prefix_len = common.get(cache, 0)
        if cache is None or cache.length < length:
            old = cache if prefix_len else None
            del candidates, common, cache  # a cache that is not copied is freed before the new one is allocated
            cache = KVCache(len(embeds), cache_length(length), embeds.device)
            if old:
                cache.grow(1, cache.length, like=old)
                cache.copy_row(0, old, 0, prefix_len)
        cache.content, cache.prompt_len = None, 0
        return cache, prefix_len

    def prefill(
        self, llm, cache: KVCache, embeds: torch.Tensor, attention_mask: torch.Tensor, prefix_len: int
    ) -> torch.Tensor:
        """Read the prompt behind its first `prefix_len` vectors; by a graph once its padded length was seen twice.

        Returns logits [B,V], which the next graph of the cache may overwrite.
        """
        length = embeds.shape[1]
        padded = max(SHORTEST_PREFILL, 2 ** (length - 1).bit_length())
        use_graph = self.graphs and self.captures_prefill and cache.batch == 1 and padded <= LONGEST_PREFILL
        if not use_graph or padded not in cache.prefill_graphs:
            cache.prefill_graphs.setdefault(padded)
            return cache.prefill(llm, embeds, attention_mask, prefix_len)
        embeds = nn.functional.pad(embeds, (0, 0, padded - length, 0))
        attention_mask = nn.functional.pad(attention_mask, (padded - length, 0))
        if cache.prefill_graphs[padded] is None:
            logits = cache.prefill(llm, embeds, attention_mask, prefix_len, cache.length)
            # Only now: a thread that has computed nothing yet could not capture.
            cache.prefill_graphs[padded] = self._capture_prefill(llm, cache, embeds)
            return logits
        graph, logits, graph_embeds, graph_positions = cache.prefill_graphs[padded]
        graph_embeds.copy_(embeds)
        graph_positions.copy_(cache.new_positions(attention_mask, prefix_len))
        graph.replay()
        return logits

    def _capture_prefill(self, llm, cache: KVCache, embeds: torch.Tensor) -> tuple | None:
        """The graph of a prefill of vectors [1,S,D], its logits, and the vectors and positions that it reads.

        None where another thread captures, or memory is short: the answer of this call must neither wait nor
        fail. In the second case no more prefills are captured.
        """
        graph_embeds = torch.zeros_like(embeds)
        graph_positions = torch.full_like(embeds[..., 0], -1, dtype=torch.long)
        if not _capturing.acquire(blocking=False):
            return None
        try:
            graph = _capture(lambda: cache.forward(llm, graph_embeds, graph_positions, cache.length), cache)
            return *graph, graph_embeds, graph_positions
        except torch.OutOfMemoryError as error:
            logging.warning("No memory for a CUDA graph of a prompt's reading; they are read without: %s", error)
            self.captures_prefill = False
            return None
        finally:
            _capturing.release()

    def step(self, llm, cache: KVCache, kv_len: int) -> torch.Tensor:
        """Logits [B,V] after the tokens that were set; by the cache's graph where there are graphs."""
        if not self.graphs:
            return cache.step(llm, kv_len)
        if cache.step_graph is None:
            try:
                cache.step_graph = self._capture_step(llm, cache)
            except Exception as error:
                if not self.compiled:
                    raise
                logging.warning("The language model could not be compiled, and decodes more slowly: %s", error)
                self.compiled = False
                cache.step_graph = self._capture_step(llm, cache)
        graph, logits = cache.step_graph
        graph.replay()
        return logits

    def _capture_step(self, llm, cache: KVCache) -> tuple["torch.cuda.CUDAGraph", torch.Tensor]:
        """A step as a graph, and the tensor of its logits. A step that is repeated changes nothing."""
        with _capturing:
            if self.compiled and self._compiled_llm is None:
                self._compiled_llm = compiled_copy(llm)
            model, kv_len = (self._compiled_llm, None) if self.compiled else (llm, cache.length)
            _run_on_side_stream(lambda: cache.step(model, kv_len), cache.ids.device)
            if self.compiled:
                exact = llm.get_input_embeddings().weight.dtype == torch.float32
                _check_step(cache.step(model, kv_len), cache.step(llm, cache.length), exact)
            return _capture(lambda: cache.step(model, kv_len), cache)


def _check_step(logits: torch.Tensor, expected: torch.Tensor, exact: bool) -> None:
    """Raise RuntimeError if a compiled step's logits [B,V] are not those of the library's layers, to rounding.

    exact: the layers compute in float32. The logits are always in float32.
    """
    difference = largest_difference((logits,), (expected,))
    if not difference <= (EXACT_TOLERANCE if exact else STEP_TOLERANCE):  # NaN is not
        raise RuntimeError(f"a compiled step differs from the library's own result by {difference:.2g}")


def _run_on_side_stream(run: Callable[[], torch.Tensor], device: torch.device) -> None:
    """Run twice before a capture, on another stream as torch asks for: the first run compiles."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)


def _capture(run: Callable[[], torch.Tensor], cache: KVCache) -> tuple["torch.cuda.CUDAGraph", torch.Tensor]:
    """`run`, which changes nothing when it is repeated, as a graph, and the tensor of its result."""
    cache.pool = cache.pool or torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads may go on allocating
    with capturing(), torch.cuda.device(cache.ids.device):
        with torch.cuda.graph(graph, pool=cache.pool, capture_error_mode="thread_local"):
            result = run()
    return graph, result


def _start_copy(ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start to copy ids to the host. Returns a function that waits for the copy, and for nothing after it."""
    host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
    host.copy_(ids, non_blocking=True)
    copied = torch.cuda.current_stream(ids.device).record_event()

    def read_ids() -> torch.Tensor:
        copied.synchronize()
        return host

    return read_ids


def _fingerprint(llm) -> int:
    """Changes when weights are moved or changed: graphs hold their addresses, caches their results."""
    weights = itertools.chain(llm.parameters(), llm.buffers())
    return hash(tuple((weight.data_ptr(), compat.version(weight)) for weight in weights))
