"""The decoding loop: a fixed cache, one CUDA graph a step on a GPU, and what was read before is not read again.

Slot n of a row holds the keys and values of its n-th token, whatever padding stood before it, so a slot is a position:
what a step may see are the slots up to its own. On a GPU the layers are compiled (`decoding_layers.py`), and a step is
captured once for each cache, then replayed; elsewhere, and for models quantised by bitsandbytes, it runs as it stands.

After an answer to a single prompt its slots are kept. The next prompt that begins with the same vectors, such as the
next turn of the conversation, is read from the first new one on.

B batch, S sequence, R reach (how many slots a mask looks at), L slots, H heads, D width.
"""

import itertools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext

import torch
from torch import nn

from minigpt4.models.cuda_graphs import RECORDING
from minigpt4.models.decoding_layers import compiled_layers
from minigpt4.models.packing import ATTENTION, sees_all

# Caches kept between answers: each conversation that goes on has one, and batches share one.
KEPT = 2

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
    ids = torch.zeros(rows, prompt, dtype=torch.long, device=llm.device)
    embeds = llm.get_input_embeddings()(ids)
    steps = decode(llm, embeds, torch.ones_like(ids), answer, lambda ids, logits: logits.argmax(dim=-1))
    with closing(steps):
        next(steps)
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
    """The least of 128, 192, 256, 384, 512, 768, 1024 … that holds `length`."""
    sizes = (size for n in itertools.count(7) for size in (2**n, 3 * 2 ** (n - 1)))
    return next(size for size in sizes if size >= length)


class Decoder:
    """The loop of one language model, and the caches that it keeps. Threads may run it side by side."""

    def __init__(self, llm, graphs: bool | None = None, compiled: bool = True):
        """graphs: None: where they can be had. compiled: the layers inside the graphs."""
        on_gpu = next(llm.parameters()).device.type == "cuda"
        self.graphs = on_gpu and not getattr(llm, "is_quantized", False) if graphs is None else graphs
        # Compiled layers have an attention of their own, which not every model would call.
        self.compiled = compiled and getattr(llm, "_supports_attention_backend", False)
        self.weights = _fingerprint(llm)
        self._idle: list[Slots] = []  # the one used last stands last
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
            logits = slots.read(llm, embeds[:, known:], attention_mask[:, known:], known)
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

    def _take(self, embeds: torch.Tensor, length: int) -> tuple["Slots", int]:
        """Slots for a batch, and how many of them hold its beginning already."""
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
            slots = Slots(len(embeds), bucket(length), embeds.device)
            if old:
                slots.copy(old, known)
        slots.content, slots.asked = None, 0
        return slots, known

    def _replay(self, llm, slots: "Slots") -> torch.Tensor:
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

    def _capture(self, llm, slots: "Slots") -> tuple["torch.cuda.CUDAGraph", torch.Tensor]:
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
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads may go on allocating
            with RECORDING, torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits = slots.step(llm, reach)
        return graph, logits


class Slots:
    """The cache of one batch, and the step that reads and fills it; transformers' models call its `update`.

    Args:
        batch: rows (B).
        length: slots of a row (L).
    """

    def __init__(self, batch: int, length: int, device: torch.device):
        self.batch, self.length = batch, length
        self.layers: list[LayerSlots] = []
        self.graph: tuple[torch.cuda.CUDAGraph, torch.Tensor] | None = None  # of a step, and its logits
        self.content: torch.Tensor | None = None  # [S,D]: what a single row was made of, its answer too
        self.asked = 0  # the length of its prompt
        self.ids = torch.zeros(batch, dtype=torch.long, device=device)
        self.positions = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self._rows = torch.arange(batch, device=device).unsqueeze(1)

    def read(self, llm, embeds: torch.Tensor, attention_mask: torch.Tensor, known: int) -> torch.Tensor:
        """Fill the slots after the first `known` with [B,S,D], padded on the left. Returns logits [B,V]."""
        if not self.layers:
            self.layers = [LayerSlots(self.length) for _ in range(llm.config.get_text_config().num_hidden_layers)]
        positions = attention_mask.cumsum(1, dtype=torch.long) - 1 + known
        self.positions.copy_(positions[:, -1:])
        # One slot more than it takes, for padding; the first new token overwrites it.
        return self._forward(llm, embeds, positions, known + embeds.shape[1] + 1)

    def advance(self, ids: torch.Tensor) -> None:
        """Set the next tokens, of all rows but those that fill up the batch."""
        self.ids[: len(ids)].copy_(ids)
        self.positions += 1

    def step(self, llm, reach: int | None) -> torch.Tensor:
        """Logits [B,V] float32 after the tokens that were set, which see the slots up to their own.

        reach: how many slots the mask has; None: in compiled layers, whose attention is told what each row sees.
        """
        return self._forward(llm, llm.get_input_embeddings()(self.ids.unsqueeze(1)), self.positions, reach)

    def _forward(self, llm, embeds: torch.Tensor, positions: torch.Tensor, reach: int | None) -> torch.Tensor:
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

    def copy(self, other: "Slots", known: int) -> None:
        """Take over the first `known` slots of another cache."""
        self.layers = [layer.copy(self.length, known) for layer in other.layers]


class LayerSlots:
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

    def copy(self, length: int, known: int) -> "LayerSlots":
        copied = LayerSlots(length)
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
