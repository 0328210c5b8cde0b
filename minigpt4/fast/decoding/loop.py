"""The decoding loop: a fixed cache, one CUDA graph a step on a GPU, and what was read before is not read again.

The cache is `slots.py`'s. On a GPU the layers are compiled (`decoding_layers.py`), and a step is captured once for each
cache, then replayed; so is the reading of a single prompt, filled up to one of few lengths. Elsewhere, and with layers
of bitsandbytes' own, both run as they stand.

After an answer to a single prompt its slots are kept. The next prompt that begins with the same vectors, such as the
next turn of the conversation, is read from the first new one on.

B batch, S sequence, D width.
"""

import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext

import torch
from torch import nn

from minigpt4.fast.attention import ATTENTION, sees_all
from minigpt4.fast.cuda_graphs import RECORDING, pools_stay
from minigpt4.fast.decoding.compiled_layers import compiled_layers
from minigpt4.fast.decoding.kv_cache import KVCache
from minigpt4.quantization.bitsandbytes import of_bitsandbytes

# Caches kept between answers: each conversation that goes on has one, and batches share one.
KEPT = 2
# Vectors that a recorded reading takes, a power of two: below, the weights alone take the time; above, the host has it.
SHORTEST_READING, LONGEST_READING = 64, 512

_decoders: "weakref.WeakKeyDictionary[nn.Module, Decoder]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_capturing = threading.Lock()


def decode(
    llm, embeds: torch.Tensor, attention_mask: torch.Tensor, steps: int, choose: Callable
) -> Iterator[torch.Tensor]:
    """Yield the next token of every row, [B] int64 on the CPU, `steps` times or until closed. For `no_grad` alone.

    On a GPU a step is under way while the token before it is looked at.

    Args:
        llm: a causal language model of transformers that `fits`.
        embeds: [B,S,D], padded on the left.
        attention_mask: [B,S], 0 on padding.
        choose: from the ids so far [B,T] and the logits [B,V] float32 to the next ids [B].
    """
    with _lock:
        decoder = _decoders.get(llm)
        if decoder is None or decoder.weights != _fingerprint(llm):
            decoder = _decoders[llm] = Decoder(llm)
    return decoder.run(llm, embeds, attention_mask, steps, choose)


def forget(llm) -> None:
    """Free the caches and graphs of a model; they come back when it is used."""
    _decoders.pop(llm, None)


@torch.inference_mode(False)
@torch.no_grad()
def warm_up(llm, prompt: int = 100, answer: int = 300, rows: int = 1) -> None:
    """On a GPU, prepare for answers of such lengths in tokens: the first would wait for the compiler."""
    if not fits(llm) or not Decoder(llm).graphs:
        return
    logging.info("Compiling the language model for answers: some fifteen seconds at first, fewer later on.")
    # A single row twice: a length that is met again is recorded. Other tokens each time, or nothing would be read.
    for token, length in enumerate((prompt, prompt, SHORTEST_READING, SHORTEST_READING) if rows == 1 else (prompt,)):
        ids = torch.full((rows, length), token, device=llm.device)
        embeds = llm.get_input_embeddings()(ids)
        steps = max(prompt + answer - length, 1)
        with closing(
            decode(llm, embeds, torch.ones_like(ids), steps, lambda ids, logits: logits.argmax(dim=-1))
        ) as run:
            next(run)
        for slots in _decoders[llm]._idle:
            slots.asked = 0  # nobody's conversation: the next prompt takes it


def fits(llm) -> bool:
    """Whether the loop can run this model: on one device, every token sees all before it, positions are rotations."""
    config = llm.config.get_text_config()
    rotary = getattr(getattr(llm, "base_model", None), "rotary_emb", None)
    return (
        getattr(rotary, "rope_type", "dynamic") in ("default", "linear", "yarn", "llama3")
        and config._attn_implementation.removeprefix(f"{ATTENTION}_") in ("sdpa", "eager")
        and sees_all(config)
        and len(set(getattr(llm, "hf_device_map", {}).values())) <= 1
    )


def bucket(length: int) -> int:
    """The least of 128, 160, 192, 224, 256, 320, 384, 448, 512 … that holds `length`."""
    sizes = (quarters * 2**n for n in itertools.count(5) for quarters in (4, 5, 6, 7))
    return next(size for size in sizes if size >= length)


class Decoder:
    """The loop of one language model, and the caches that it keeps. Threads may run it side by side."""

    def __init__(self, llm, graphs: bool | None = None, compiled: bool = True):
        """graphs: None: where they can be had. compiled: the layers inside the graphs."""
        on_gpu = next(llm.parameters()).device.type == "cuda"
        self.graphs = on_gpu and not of_bitsandbytes(llm) if graphs is None else graphs
        # Compiled layers have an attention of their own, which not every model would call.
        self.compiled = compiled and getattr(llm, "_supports_attention_backend", False)
        self.records = True  # prompts' readings
        self.weights = _fingerprint(llm)
        self._idle: list[KVCache] = []  # the one used last stands last
        self._lock = threading.Lock()

    def run(
        self, llm, embeds: torch.Tensor, attention_mask: torch.Tensor, steps: int, choose: Callable
    ) -> Iterator[torch.Tensor]:
        """See `decode`."""
        rows = len(embeds)
        if rows == 1:
            embeds = embeds[:, attention_mask[0].bool()]
            attention_mask = attention_mask.new_ones(embeds.shape[:2])
        elif self.graphs:  # powers of two bound the number of graphs
            missing = 2 ** (rows - 1).bit_length() - rows
            embeds = nn.functional.pad(embeds, (0, 0, 0, 0, 0, missing))
            attention_mask = nn.functional.pad(attention_mask, (0, 0, 0, missing))
        length = embeds.shape[1]
        history = torch.zeros(rows, steps, dtype=torch.long, device=embeds.device)
        slots, known = self._take(embeds, length + steps)
        fed, content = 0, None
        try:
            logits = self._read(llm, slots, embeds[:, known:], attention_mask[:, known:], known)
            content = embeds[0]
            for n in range(steps):
                with RECORDING:  # torch's random numbers belong to a graph while that is recorded
                    history[:, n] = ids = choose(history[:, :n], logits[:rows])
                look = _read_later(ids) if self.graphs else ids.cpu
                if not self.graphs:
                    yield look()
                if n + 1 < steps:
                    slots.advance(ids)
                    logits = self._replay(llm, slots) if self.graphs else slots.step(llm, length + n + 1)
                    fed += 1
                if self.graphs:
                    yield look()
        finally:
            if rows == 1 and content is not None:
                said = llm.get_input_embeddings()(history[0, :fed]).to(content.dtype)
                slots.content, slots.asked = torch.cat([content, said]), length
            with self._lock:
                self._idle = [*self._idle, slots][-KEPT:]

    def _take(self, embeds: torch.Tensor, length: int) -> tuple[KVCache, int]:
        """KVCache for a batch, and how many of them hold its beginning already."""
        with self._lock:
            alike = [slots for slots in self._idle if slots.batch == len(embeds)]
            shared = {slots: slots.shared(embeds) for slots in alike}
            slots = max(alike, key=shared.__getitem__, default=None)
            # What only begins like the prompt before is another conversation; the one before may go on too.
            if slots and 4 * shared[slots] < 3 * slots.asked:
                slots = alike[0] if len(self._idle) >= KEPT else None
            if slots:
                self._idle.remove(slots)
            else:
                self._idle = self._idle[1 - KEPT :]
        known = shared.get(slots, 0)
        if slots is None or slots.length < length:
            old = slots if known else None
            del alike, shared, slots  # a cache that is not copied makes room first
            slots = KVCache(len(embeds), bucket(length), embeds.device)
            if old:
                slots.copy(old, known)
        slots.content, slots.asked = None, 0
        return slots, known

    def _read(
        self, llm, slots: KVCache, embeds: torch.Tensor, attention_mask: torch.Tensor, known: int
    ) -> torch.Tensor:
        """Fill the slots after the first `known`, by a graph where such a length was met twice. Returns logits [B,V],
        which the next graph of the slots may overwrite.
        """
        length = embeds.shape[1]
        places = max(SHORTEST_READING, 2 ** (length - 1).bit_length())
        recorded = self.graphs and self.records and slots.batch == 1 and places <= LONGEST_READING
        if not recorded or places not in slots.readings:
            slots.readings.setdefault(places)
            return slots.read(llm, embeds, attention_mask, known)
        embeds = nn.functional.pad(embeds, (0, 0, places - length, 0))
        attention_mask = nn.functional.pad(attention_mask, (places - length, 0))
        if slots.readings[places] is None:
            logits = slots.read(llm, embeds, attention_mask, known, slots.length)
            # Behind it, since a thread that has computed nothing yet could not record.
            slots.readings[places] = self._capture_reading(llm, slots, embeds)
            return logits
        graph, logits, prompt, positions = slots.readings[places]
        prompt.copy_(embeds)
        positions.copy_(slots.find(attention_mask, known))
        graph.replay()
        return logits

    def _capture_reading(self, llm, slots: KVCache, embeds: torch.Tensor) -> tuple | None:
        """The reading of so many vectors [1,S,D]: its graph, its logits, the vectors and positions that it takes.

        None where another thread records, or memory is short: the answer that was read for must not wait, or fail. In
        the second case there will be no more of them.
        """
        prompt, positions = torch.zeros_like(embeds), torch.full_like(embeds[..., 0], -1, dtype=torch.long)
        if not _capturing.acquire(blocking=False):
            return None
        try:
            return *_record(lambda: slots.fill(llm, prompt, positions, slots.length), slots), prompt, positions
        except torch.OutOfMemoryError as error:
            logging.warning("No memory for a CUDA graph of a prompt's reading; they are read without: %s", error)
            self.records = False
            return None
        finally:
            _capturing.release()

    def _replay(self, llm, slots: KVCache) -> torch.Tensor:
        if slots.graph is None:
            try:
                slots.graph = self._capture(llm, slots)
            except Exception as error:
                if not self.compiled:
                    raise
                logging.warning("The language model could not be compiled, and decodes more slowly: %s", error)
                self.compiled = False
                slots.graph = self._capture(llm, slots)
        graph, logits = slots.graph
        graph.replay()
        return logits

    def _capture(self, llm, slots: KVCache) -> tuple["torch.cuda.CUDAGraph", torch.Tensor]:
        """A step as a graph, and where it leaves its logits. A step changes nothing when it is repeated."""
        device, reach = slots.ids.device, None if self.compiled else slots.length
        compiled = compiled_layers(llm, slots) if self.compiled else nullcontext()
        with _capturing, torch.cuda.device(device), compiled:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    slots.step(llm, reach)
            torch.cuda.current_stream().wait_stream(stream)
            return _record(lambda: slots.step(llm, reach), slots)


def _record(run: Callable[[], torch.Tensor], slots: KVCache) -> tuple["torch.cuda.CUDAGraph", torch.Tensor]:
    """`run`, which changes nothing when it is repeated, as a graph, and where that leaves its result."""
    slots.pool = slots.pool or torch.cuda.graph_pool_handle()
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads may go on allocating
    with RECORDING, pools_stay(), torch.cuda.device(slots.ids.device):
        with torch.cuda.graph(graph, pool=slots.pool, capture_error_mode="thread_local"):
            result = run()
    return graph, result


def _read_later(ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start to copy ids off the GPU. Returns what waits for them, and for nothing that comes after."""
    host = torch.empty(ids.shape, dtype=ids.dtype, pin_memory=True)
    host.copy_(ids, non_blocking=True)
    copied = torch.cuda.current_stream(ids.device).record_event()

    def look() -> torch.Tensor:
        copied.synchronize()
        return host

    return look


def _fingerprint(llm) -> int:
    """Changes when weights are moved or changed: graphs hold their addresses, caches what they computed."""
    weights = itertools.chain(llm.parameters(), llm.buffers())
    return hash(tuple((w.data_ptr(), None if w.is_inference() else w._version) for w in weights))
