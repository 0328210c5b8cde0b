"""Curves of runs, from their metrics.jsonl. matplotlib is imported only to draw."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from minigpt4.common.errors import ConfigError
from minigpt4.common.text import pluralize
from minigpt4.tracking import metrics

UNITS = {
    "loss": "loss (nats per token)",
    "lr": "learning rate",
    "grad_norm": "norm of the gradient",
    "images_per_second": "images a second",
    "tokens_per_second": "tokens a second",
    "step_seconds": "seconds a step",
    "data_seconds": "seconds a step waiting for data",
    "gpu_memory_mib": "GPU memory at most (MiB)",
    "host_memory_mib": "memory of the process (MiB)",
}
# Not drawn, unless they are asked for.
OTHERS = ("step", "time", "epoch", "train_lr", "train_loss", "step_seconds", "data_seconds", "tokens_per_second")
OTHERS += ("host_memory_mib", "eval_seconds", "skipped_updates", "loss_spikes", "float16_overflows")
MAX_MARKERS = 30


class Run(NamedTuple):
    """A run that is drawn."""

    name: str
    lines: list[dict[str, Any]]

    def curve(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values, as far as they are numbers."""
        points = [(line["step"], line[metric]) for line in self.lines if isinstance(line.get(metric), int | float)]
        return [step for step, _ in points], [metrics.plain(value) for _, value in points]


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each a run's own or one that holds those of several runs.

    Raises ConfigError for a folder without a run, and if there is nothing to draw.
    """
    folders: list[Path] = []
    for path in paths:
        below = sorted(file.parent for file in path.glob(f"*/{metrics.NAME}"))
        found = [path] if (path / metrics.NAME).is_file() else below
        if not found:
            raise ConfigError(f"{path} is no folder of a run: neither it nor a folder in it has a {metrics.NAME}.")
        folders += found
    runs = list(map(read_run, folders))
    if not metrics_to_draw(runs):
        raise ConfigError(f"{', '.join(map(str, paths))}: no number to draw was written yet to {metrics.NAME}.")
    return runs


def read_run(folder: Path) -> Run:
    """The run in its own folder; without lines if nothing was written yet."""
    file = folder / metrics.NAME
    return Run(_name(folder.resolve()), metrics.read_metrics(file) if file.is_file() else [])


def metrics_to_draw(runs: Sequence[Run]) -> list[str]:
    """The metrics that say most: loss, results of evaluations, learning rate, gradient, speed, memory."""
    names = _curves(runs)
    usual = [name for name in UNITS if name in names and name not in OTHERS]
    results = [name for name in names if name not in (*UNITS, *OTHERS) and "/" not in name]
    return usual[:1] + results + usual[1:]


def need_matplotlib() -> None:
    """Raise ConfigError if it is not installed."""
    if find_spec("matplotlib") is None:
        raise ConfigError("Curves are drawn with matplotlib, which is not installed: pip install matplotlib")


def _curves(runs: Sequence[Run]) -> list[str]:
    """The names that have numbers, in the order of the files; digests and texts have none."""
    names = dict.fromkeys(name for run in runs for line in run.lines for name in line)
    return [name for name in names if any(run.curve(name)[0] for run in runs)]


def draw(runs: Sequence[Run], names: Sequence[str], columns: int = 2):
    """A matplotlib figure with a panel for each metric. Raises ConfigError for a metric that no run has."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):  # a name may have a $
        return _draw(runs, names, columns)


def _draw(runs: Sequence[Run], names: Sequence[str], columns: int):
    from matplotlib.figure import Figure

    rows = -(-len(names) // columns)
    legend = 0.25 * len(runs) if len(runs) > 1 else 0
    figure = Figure(figsize=(5.5 * columns, 3.2 * rows + legend), layout="constrained")
    panels = iter(figure.subplots(rows, columns, squeeze=False).flat)
    for name, panel in zip(names, panels, strict=False):
        if not any(run.curve(name)[0] for run in runs):
            known = sorted({*_curves(runs)} - {"step", "time"})
            raise ConfigError(f"No run has the metric {name!r}. Known: {', '.join(known)}.")
        for number, run in enumerate(runs):
            _draw_curve(panel, *run.curve(name), color=f"C{number}", smooth=name != "lr")
        panel.set(title=UNITS.get(name, name), xlabel="step")
        panel.grid(alpha=0.3)
        panel.margins(x=0.02)
    for panel in panels:  # those that are left
        panel.set_axis_off()
    if legend:
        handles = [figure.axes[0].plot([], [], color=f"C{number}")[0] for number in range(len(runs))]
        figure.legend(handles, [run.name for run in runs], loc="outside upper left")
    return figure


def save_png(path: Path, runs: Sequence[Run], names: Sequence[str]) -> str:
    """Draw a PNG, in place of an earlier one of this function if there is one. Returns what it shows, in words.

    Raises ConfigError for another file at this path.
    """
    software = "minigpt4 plot"
    if path.suffix.lower() != ".png":
        raise ConfigError(f"--out {path}: the picture is a PNG. Name a file that ends in .png.")
    if path.exists() and _software(path) != software:
        raise ConfigError(f"--out {path} exists, and this command did not write it. Name another file.")
    need_matplotlib()
    figure, part = draw(runs, names), path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(part, dpi=110, format="png", metadata={"Software": software})
        part.replace(path)
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error.strerror}. Name another place.") from None
    return f"{pluralize(len(runs), 'run')}: {', '.join(names)}"


def _software(path: Path) -> str | None:
    """The program that a picture names as its maker."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.info.get("Software")
    except OSError:
        return None


def _name(folder: Path) -> str:
    """`run.name` and the run's folder, or without a name the folders."""
    try:
        name = OmegaConf.select(OmegaConf.load(folder / "config.yaml"), "run.name")
    except (OSError, OmegaConfBaseException, YAMLError):  # of another release, or damaged
        name = ""
    return f"{name} ({folder.name})" if name else f"{folder.parent.name}/{folder.name}"


def _draw_curve(panel, steps: list[int], values: list[float], color: str, smooth: bool) -> None:
    """A curve; one of many points is drawn faintly behind its running mean."""
    import numpy as np

    window = len(values) // 20 | 1  # odd
    if window < 3 or not smooth:
        panel.plot(steps, values, "o-" if len(values) <= MAX_MARKERS else "-", color=color, markersize=3)
        return
    panel.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    weights = np.ones(window)
    sums, counts = (np.convolve(each, weights, "same") for each in (values, np.ones(len(values))))
    panel.plot(steps, sums / counts, color=color)
