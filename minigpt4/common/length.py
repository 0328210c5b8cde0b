"""How long a run is."""

from dataclasses import dataclass

from minigpt4.common.words import counted


@dataclass(frozen=True)
class RunLength:
    """Batches of `batch_size` on each of `world_size` ranks, `iters_per_epoch` in each of `epochs`."""

    batch_size: int
    world_size: int
    iters_per_epoch: int
    epochs: int
    accum: int = 1
    on_gpu: bool = True

    @property
    def batches(self) -> int:
        """Micro-batches of each rank."""
        return self.epochs * self.iters_per_epoch

    @property
    def steps(self) -> int:
        """Updates; what is left at an epoch's end is one too."""
        return self.epochs * -(-self.iters_per_epoch // self.accum)

    @property
    def samples(self) -> int:
        return self.batches * self.batch_size * self.world_size

    def duration(self, batch_seconds: float) -> str:
        """With so many seconds for each micro-batch: "40 s", "12 min", "3.5 hours"."""
        minutes = self.batches * batch_seconds / 60
        if minutes < 1.5:
            return f"{round(60 * minutes)} s"
        return f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{round(minutes)} min"

    def __str__(self) -> str:
        total = self.batch_size * self.world_size * self.accum
        each, several = ("GPU", "GPUs") if self.on_gpu else ("process", "processes")
        accumulated = f", {self.accum} batches a step" if self.accum > 1 else ""
        return (
            f"batch {self.batch_size} per {each}, {total} in total "
            f"({counted(self.world_size, each, several)}{accumulated}); "
            f"{counted(self.epochs, 'epoch')} of {counted(self.iters_per_epoch, 'batch', 'batches')} = "
            f"{counted(self.steps, 'step')}, {counted(self.samples, 'sample')}"
        )
