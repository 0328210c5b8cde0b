"""Numbers that go wrong: updates that are skipped, batches that are named, and the digest of the samples of a run.

All ranks see the same numbers and decide alike. On a GPU the host reads the numbers of an update LAG updates later, so
that it never waits for them; the GPU itself skips the update.
"""

import hashlib
import heapq
import logging
import math
from collections import Counter, deque
from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

import torch

from minigpt4.common import dist_utils
from minigpt4.common.text import pluralize
from minigpt4.datasets.samples import SampleId

# Updates after which the host reads what a GPU has computed. It is hardly ever that far ahead.
LAG = 4
# A spike is a loss of more than FACTOR times the second highest of the WINDOW updates before. Datasets take turns, and
# each has a level of its own: none of them is a spike. The second, so that one spike hides no other. The first
# MIN_WINDOW updates are not judged. Of spikes in a row the first is named.
WINDOW, MIN_WINDOW, FACTOR = 100, 20, 1.5
# Samples that a warning names. BAD_BATCHES names all.
SHOWN = 3
BAD_BATCHES = "bad_batches.jsonl"


class Update(NamedTuple):
    """An update whose numbers the host has not read yet."""

    step: int
    ids: list[SampleId]
    """Of this rank, all micro-batches."""
    numbers: torch.Tensor
    """The norm of the gradient, and the loss of all ranks and of this one."""
    done: "torch.cuda.Event | None"


class Health:
    """Watches the losses and gradients of the updates of a run.

    Args:
        scaler: the run's loss scaler, whose overflows are part of float16.
        max_bad_steps: skipped updates in a row after which `failure` says that the run has to stop.
        append: adds a line to a file of the run's folder; see `RunRecord.append`.

    `grad_norm` is the norm of the gradient of the last update, before it was clipped.
    """

    def __init__(
        self,
        device: torch.device,
        scaler: torch.amp.GradScaler,
        max_bad_steps: int,
        append: Callable[[str, dict[str, Any]], None],
    ) -> None:
        self.scaler, self.max_bad_steps, self.append = scaler, max_bad_steps, append
        self.counts: Counter[str] = Counter()  # since the last `take_counts`
        self.in_a_row, self.in_spike, self.failure = 0, False, ""
        self.grad_norm: torch.Tensor | None = None
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.digest = self._digest_at_update = ""
        self._on_gpu = device.type == "cuda"
        self._rows = torch.empty(LAG + 1, 3, pin_memory=True) if self._on_gpu else None
        self._ids: list[SampleId] = []
        self._sums: list[torch.Tensor] = []  # [2,2] of each micro-batch
        self._updates: deque[Update] = deque()
        self._count = 0

    def add(self, sums: torch.Tensor, own: torch.Tensor, ids: list[SampleId]) -> None:
        """Take a micro-batch: [labels, sum of their losses] of all ranks and of this one, and this one's samples."""
        self._sums.append(torch.stack([sums, own]))
        self._ids += ids
        if ids:
            text = "\n".join([self.digest, *(f"{each.dataset}\t{each.key}" for each in ids)])
            self.digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()

    def update(self, optimizer: torch.optim.Optimizer, norm: torch.Tensor, step: int) -> None:
        """Let the optimizer update the weights, unless the loss or the norm of the gradient is not finite.

        Then weights and state stay as they are, on all ranks. step: its number, for messages.
        """
        self.grad_norm = norm
        sums = sum(self._sums) if self._sums else norm.new_zeros(2, 2)  # a plug-in's step may not call `add`
        losses = sums[:, 1] / sums[:, 0].clamp(min=1)
        numbers = torch.cat([norm.reshape(1), losses])
        is_bad = ~numbers[:2].isfinite().all()
        if all(group["fused"] for group in optimizer.param_groups):
            optimizer.grad_scale, optimizer.found_inf = None, is_bad.float()
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf
        elif not is_bad:
            optimizer.step()
        done = None
        if self._on_gpu:
            numbers = self._rows[self._count % len(self._rows)].copy_(numbers, non_blocking=True)
            done = torch.cuda.current_stream().record_event()
        self._updates.append(Update(step, self._ids, numbers, done))
        self._count += 1
        self._ids, self._sums, self._digest_at_update = [], [], self.digest
        self.read(keep=LAG if self._on_gpu else 0)

    def read(self, keep: int = 0) -> None:
        """Look at the numbers of the updates, except the `keep` latest ones."""
        while len(self._updates) > keep:
            update = self._updates.popleft()
            if update.done:
                update.done.synchronize()
            self._judge(update, *update.numbers.tolist())

    def take_counts(self, epoch: int) -> dict[str, int]:
        """Log and return how many updates of an epoch were skipped, and the like, by name; only those that happened."""
        taken, self.counts = dict(self.counts), Counter()
        for name, count in taken.items():
            logging.info("Epoch %d: %s: %d.", epoch, name.replace("_", " "), count)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with after the last update. Call `read` before."""
        own = {"in_a_row": self.in_a_row, "in_spike": self.in_spike, "digest": self._digest_at_update}
        return {"counts": dict(self.counts), "losses": list(self.losses), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.counts, self.losses = Counter(state["counts"]), deque(state["losses"], WINDOW)
        self.in_a_row, self.in_spike = state["in_a_row"], state["in_spike"]
        self.digest = self._digest_at_update = state["digest"]

    def _judge(self, update: Update, norm: float, loss: float, own_loss: float) -> None:
        if math.isfinite(norm) and math.isfinite(loss):
            usual = heapq.nlargest(2, self.losses)[-1] if len(self.losses) >= MIN_WINDOW else math.inf
            is_spike = loss > max(usual, FACTOR * usual)  # a plug-in's loss may be negative
            if is_spike and not self.in_spike:
                self.counts["loss_spikes"] += 1
                text = f"a spike of the loss: {loss:.4f}, and before at most {usual:.4f}; the update was made"
                self._name(update, "a spike of the loss", text, norm, own_loss, everywhere=True)
            self.losses.append(loss)
            self.in_a_row, self.in_spike = 0, is_spike
            return
        if math.isfinite(loss) and self.scaler.is_enabled() and self.scaler.get_scale() >= 1:
            self.counts["float16_overflows"] += 1  # the scaler looks for the largest scale in this way
            return
        self.counts["skipped_updates"] += 1
        self.in_a_row += 1
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
        self._name(update, what, f"{what}; the update was skipped", norm, own_loss, everywhere=math.isfinite(loss))
        if self.in_a_row >= self.max_bad_steps:
            self.failure = self.failure or (
                f"Step {update.step}: {what}, as in {pluralize(self.in_a_row, 'update')} in a row "
                f"(run.max_bad_steps), which were skipped. {BAD_BATCHES} names their samples. Lower run.init_lr, set "
                "run.grad_clip, or check these samples and the weights that were loaded; with fp16, try "
                "run.amp_dtype=bf16."
            )

    def _name(self, update: Update, reason: str, text: str, norm: float, own_loss: float, everywhere: bool) -> None:
        """Name the samples of an update: those of all ranks, or of the ranks whose own loss is not finite."""
        ranks = dist_utils.gather_objects((own_loss, update.ids))
        chosen = {rank: part for rank, part in enumerate(ranks) if everywhere or not math.isfinite(part[0])}
        parts = chosen or dict(enumerate(ranks))
        if dist_utils.is_main_process():
            for rank, (loss, ids) in parts.items():
                about = {"step": update.step, "reason": reason, "rank": rank}
                numbers = {"loss": loss, "grad_norm": norm}
                numbers = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
                samples = [{"dataset": each.dataset, "key": each.key, "shard": each.shard} for each in ids]
                self.append(BAD_BATCHES, {**about, **numbers, "samples": samples})
        ids = [each for _, part in parts.values() for each in part]
        named = "; ".join(map(str, islice(ids, SHOWN))) or "a batch without names"
        more = f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else ""
        of = f" of rank {', '.join(map(str, parts))}" if len(ranks) > 1 else ""
        if dist_utils.is_main_process():
            logging.warning("Step %d: %s. Its samples%s: %s%s (%s).", update.step, text, of, named, more, BAD_BATCHES)
