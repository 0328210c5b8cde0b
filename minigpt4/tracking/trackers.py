"""Trackers: `run.trackers` names those that get the numbers of a run.

A tracker is a class that is registered under a name: `@registry.register("tracker", name)`. Rank 0 starts it in a
process of its own (`process.py`): whatever it does there, raising and hanging included, the run goes on.
"""

import io
import os
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from minigpt4.common.registry import registry

# Seconds to wait for the server of Weights & Biases.
ONLINE_SECONDS = 30


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


def is_picture(value: Any) -> bool:
    """Whether a value is a PIL image, which need not be imported for this."""
    return hasattr(value, "tobytes") and hasattr(value, "getbands")


@registry.register("tracker", "tensorboard")
class TensorBoard(Tracker):
    """Event files in the run's folder, numbers in float64: `tensorboard --logdir output`."""

    package = "tensorboard"

    def __init__(self, run: RunInfo):
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self.writer = EventFileWriter(os.path.join(run.folder, "tensorboard"))

    def log(self, step, values):
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        entries = [_summary_value(name, value) for name, value in values.items()]
        self.writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=entries)))
        self.writer.flush()

    def close(self):
        self.writer.close()


def _summary_value(name: str, value: Any):
    """TensorBoard's form of a value. Its writer, and torch's by default, would round numbers to float32."""
    import numpy as np
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.scalar.metadata import create_summary_metadata
    from tensorboard.plugins.text.summary_v2 import text_pb
    from tensorboard.util.tensor_util import make_tensor_proto

    if isinstance(value, str):
        return text_pb(name, value).value[0]
    if is_picture(value):
        value.save(file := io.BytesIO(), format="PNG")
        picture = Summary.Image(width=value.width, height=value.height, encoded_image_string=file.getvalue())
        return Summary.Value(tag=name, image=picture)
    metadata = create_summary_metadata(display_name="", description="")
    return Summary.Value(tag=name, tensor=make_tensor_proto(np.float64(value)), metadata=metadata)


@registry.register("tracker", "wandb")
class Wandb(Tracker):
    """Weights & Biases, in the project WANDB_PROJECT ("minigpt4").

    Offline with WANDB_MODE=offline, without a key, and if there is no answer: `wandb sync` uploads the run later.
    """

    package = "wandb"

    def __init__(self, run: RunInfo):
        import wandb

        self.image = wandb.Image
        about = {"id": run.id, "name": run.name, "resume": "allow", "config": run.config, "dir": run.folder}
        about |= {"project": os.environ.get("WANDB_PROJECT", "minigpt4")}
        settings = wandb.Settings(console="off", init_timeout=ONLINE_SECONDS)
        try:
            self.run = wandb.init(settings=settings, **about)
        except wandb.errors.Error:  # there is no key, or no network
            wandb.teardown()
            self.run = wandb.init(settings=settings, mode="offline", **about)

    def log(self, step, values):
        shown = {name: self.image(value) if is_picture(value) else value for name, value in values.items()}
        self.run.log(shown, step=step)

    def close(self):
        self.run.finish()


@registry.register("tracker", "trackio")
class Trackio(Wandb):  # whose methods Trackio has, too
    """Trackio, on this machine unless TRACKIO_SPACE_ID names a Space: `trackio show --project minigpt4`."""

    package = "trackio"

    def __init__(self, run: RunInfo):
        import trackio

        self.image = trackio.Image
        name = run.name if run.id in run.name else f"{run.name} {run.id}"  # it knows runs by their names
        project = os.environ.get("TRACKIO_PROJECT", "minigpt4")
        self.run = trackio.init(project=project, name=name, config=run.config, resume="allow", embed=False)
