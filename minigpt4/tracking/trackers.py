"""Trackers: `run.trackers` names those that get the numbers of a run.

A tracker is a class that is registered under a name. The run starts it in a process of its own (`process.py`), on rank 0:
whatever it does there, raising and hanging included, the run goes on.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from minigpt4.common.registry import registry


class RunInfo(NamedTuple):
    """What a tracker gets to know about its run."""

    id: str
    """Unique, in letters, digits, `.`, `_` and `-`. A resumed run has the id of the run that it goes on with."""
    name: str
    folder: str
    """The folder of the run. That of a resumed run is another one."""
    config: dict[str, Any]


class Tracker:
    """The contract with trackers: the constructor takes a `RunInfo`, and `log` and `close` are called after it."""

    package = ""
    """The package that it needs, beside our own requirements."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Take values by name: numbers, texts, and pictures (`PIL.Image.Image`). Steps never decrease."""
        raise NotImplementedError

    def close(self) -> None:
        """Write what is left. The run waits for it, but not for longer than `process.PATIENCE` seconds."""


@registry.register("tracker", "tensorboard")
class TensorBoard(Tracker):
    """Event files in the run's folder, numbers in float64: `tensorboard --logdir output`."""

    package = "tensorboard"

    def __init__(self, run: RunInfo):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(os.path.join(run.folder, "tensorboard"))

    def log(self, step, values):
        import numpy as np

        for name, value in values.items():
            if isinstance(value, str):
                self.writer.add_text(name, value, step)
            elif hasattr(value, "convert"):
                self.writer.add_image(name, np.asarray(value.convert("RGB")), step, dataformats="HWC")
            else:
                self.writer.add_scalar(name, value, step, new_style=True, double_precision=True)
        self.writer.flush()

    def close(self):
        self.writer.close()


@registry.register("tracker", "wandb")
class Wandb(Tracker):
    """Weights & Biases, in the project WANDB_PROJECT ("minigpt4"). Without a key it is offline: `wandb sync` uploads."""

    package = "wandb"

    def __init__(self, run: RunInfo):
        import wandb

        self.image = wandb.Image
        about = {"id": run.id, "name": run.name, "resume": "allow", "config": run.config, "dir": run.folder}
        about |= {"project": os.environ.get("WANDB_PROJECT", "minigpt4"), "settings": wandb.Settings(console="off")}
        try:
            self.run = wandb.init(**about)
        except wandb.errors.UsageError:  # there is no key
            self.run = wandb.init(mode="offline", **about)

    def log(self, step, values):
        shown = {name: self.image(value) if hasattr(value, "convert") else value for name, value in values.items()}
        self.run.log(shown, step=step)

    def close(self):
        self.run.finish()


@registry.register("tracker", "trackio")
class Trackio(Tracker):
    """Trackio, on this machine unless TRACKIO_SPACE_ID names a Space: `trackio show --project minigpt4`."""

    package = "trackio"

    def __init__(self, run: RunInfo):
        import trackio

        self.image = trackio.Image
        name = run.name if run.id in run.name else f"{run.name} {run.id}"  # it knows runs by their names
        project = os.environ.get("TRACKIO_PROJECT", "minigpt4")
        self.run = trackio.init(project=project, name=name, config=run.config, resume="allow", embed=False)

    def log(self, step, values):
        shown = {name: self.image(value) if hasattr(value, "convert") else value for name, value in values.items()}
        self.run.log(shown, step=step)

    def close(self):
        self.run.finish()
