"""report.html: a run on one page, made from the files in its folder. It needs no network and no other file."""

import html
import io
import json
import logging
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from minigpt4.common.html_page import html_page, img
from minigpt4.common.output import write_whole
from minigpt4.tracking import metrics, plot
from minigpt4.tracking.record import PICTURES
from minigpt4.tracking.run_files import CONFIG, ENVIRONMENT, without_passwords

NAME = "report.html"
# Versions that are shown at once; the others are folded.
MAIN_PACKAGES = ("minigpt4", "torch", "transformers", "timm", "bitsandbytes", "numpy")
# Names of texts that are warnings begin so.
WARNING = "warning/"
MOST_PICTURES = 100
# Counts of what was left out and the like: `verb/dataset/cause`.
COUNT = re.compile(r"(left_out|cut_off|broke_up)/([^/]*)/(.*)")


def write_report(folder: Path) -> Path | None:
    """Write the report of a run into its folder; None: it failed, and a warning says why."""
    try:
        return write_whole(folder / NAME, report(folder))
    except Exception as error:  # the run is done; nothing here may make it look as if it failed
        logging.warning("%s was not written: %s: %s", folder / NAME, type(error).__name__, error)
        return None


def report(folder: Path) -> str:
    """The page. Raises OSError and ValueError for a folder whose files cannot be read."""
    about = json.loads((folder / ENVIRONMENT).read_text(encoding="utf-8"))
    config = without_passwords((folder / CONFIG).read_text(encoding="utf-8"))
    run = plot.read_run(folder)
    parts = [
        f"<h1>{_text(run.name)}</h1><p class=soft>Started {_text(about['started'])} in {_text(str(folder))}</p>",
        _tiles(run),
        _section("Warnings", "".join(_warnings(run))),
        _section("Curves", _curves(run)),
        _section("Results", _results(run)),
        _section("Evaluations", "".join(_evaluations(folder))),
        _section("Answers", "".join(_answers(run, _pictures(folder)))),
        _section("Settings that differ from the defaults", _settings(about["changed_settings"])),
        _section("Data", _data(run) if run.lines else ""),
        _section("Environment", _environment(about)),
        _section("To start it again", _again(about, config)),
    ]
    return html_page(run.name, "\n".join(parts), Path(__file__).with_suffix(".css").read_text(encoding="utf-8"))


def _tiles(run: plot.Run) -> str:
    """The figures of the run as a whole."""
    seconds, waiting = _total(run, "step_seconds"), _total(run, "data_seconds")
    peaks = {name: max(run.curve(name)[1], default=0) for name in ("gpu_memory_mib", "host_memory_mib")}
    speeds = sorted(run.curve("images_per_second")[1])
    shown = {
        "steps": f"{run.lines[-1]['step']:,}" if run.lines else "0",
        "loss, mean of the last epoch": _last(run, "train_loss"),
        "loss of the validation": _last(run, "val_loss"),
        "in training steps": f"{seconds / 60:.1f} min" if seconds else "",
        "waiting for data": f"{waiting / seconds:.1%}" if seconds else "",
        "images a second (median)": f"{speeds[len(speeds) // 2]:.1f}" if speeds else "",
        "GPU memory at most": f"{peaks['gpu_memory_mib'] / 1024:.1f} GiB" if peaks["gpu_memory_mib"] else "",
        "memory of the process": f"{peaks['host_memory_mib'] / 1024:.1f} GiB" if peaks["host_memory_mib"] else "",
    }
    return f"<div class=tiles>{''.join(f'<div><b>{v}</b>{k}</div>' for k, v in shown.items() if v)}</div>"


def _total(run: plot.Run, name: str) -> float:
    """The sum over all steps of a value that each line has as a mean over the steps since the line before."""
    steps, values = run.curve(name)
    starts = [steps[0] - 1, *steps] if steps else []
    return sum(value * (step - before) for value, (before, step) in zip(values, pairwise(starts), strict=True))


def _last(run: plot.Run, name: str) -> str:
    values = run.curve(name)[1]
    return f"{values[-1]:.4f}" if values else ""


def _curves(run: plot.Run) -> str:
    names = plot.metrics_to_draw([run])
    if not names:
        return ""
    if find_spec("matplotlib") is None:
        return "<p>Curves need matplotlib (<code>pip install matplotlib</code>).</p>"
    import matplotlib

    pictures = []
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        for name in names:
            file = io.StringIO()
            plot.draw([run], [name], columns=1).savefig(file, format="svg", metadata={"Date": None})
            pictures.append(file.getvalue()[file.getvalue().index("<svg") :])
    return f"<div class=curves>{''.join(pictures)}</div>"


def _results(run: plot.Run) -> str:
    """A row for each step with results, and the tests."""
    names = [name for name in plot.metrics_to_draw([run]) if name not in plot.UNITS]
    names = [name for name in ("train_loss", *names) if run.curve(name)[0]]
    by_step: dict[int, dict[str, float]] = {}
    for name in names:
        for step, value in zip(*run.curve(name), strict=True):
            by_step.setdefault(step, {})[name] = value
    rows = ([step, *(values.get(name, "") for name in names)] for step, values in sorted(by_step.items()))
    tests = {name[5:]: value for line in run.lines for name, value in line.items() if name.startswith("test/")}
    return _table(["step", *names], rows) + (f"<h3>Test</h3>{_table(['', ''], tests.items())}" if tests else "")


def _evaluations(folder: Path) -> Iterator[str]:
    """The figures of each evaluation in the run's folder, as `evaluate` and `run.test_splits` write them."""
    for path in sorted(folder.glob("*/scores.json")):
        scores = json.loads(path.read_text(encoding="utf-8"))
        rows = []
        for name, figure in scores["figures"].items():
            value, low, high = (f"{figure[end] * figure['scale']:.1f}" for end in ("value", "low", "high"))
            rows.append([name, value, f"{low} to {high}"])
        name = path.parent.name
        about = f"{name}: task {scores['task']}, {scores['n']:,} answers. {name}/answers.html has them."
        yield f"<p class=soft>{_text(about)}</p>{_table(['', 'value', '95 % interval'], rows)}"


def _pictures(folder: Path) -> dict[str, str]:
    """{name: element} of the pictures that a run has recorded."""
    paths = sorted((folder / PICTURES).glob("*.jpg"))[:MOST_PICTURES]
    return {unquote(path.stem): img(path.read_bytes()) for path in paths}


def _answers(run: plot.Run, pictures: dict[str, str]) -> Iterator[str]:
    """The latest text of each name, such as answers of an evaluation beside their pictures; then other pictures."""
    for name, (step, text) in _latest_texts(run).items():
        if name.startswith(WARNING):
            continue
        yield f"<p class=soft>{_text(name)}, step {step:,}</p>"
        lines, prefix = text.split("\n"), f"{name.removesuffix('_answers')}_picture/"
        beside = [pictures.pop(f"{prefix}{number}", "") for number in range(1, len(lines) + 1)]
        if any(beside):
            rows = (f"<li>{each}<span>{_text(line)}</span></li>" for each, line in zip(beside, lines, strict=True))
            yield f"<ul class=answers>{''.join(rows)}</ul>"
        else:
            yield f"<pre>{_text(text)}</pre>"
    for name, picture in pictures.items():
        yield f"<figure>{picture}<figcaption>{_text(name)}</figcaption></figure>"


def _warnings(run: plot.Run) -> Iterator[str]:
    """The latest warning of each kind."""
    for name, (step, text) in _latest_texts(run).items():
        if name.startswith(WARNING):
            yield f"<p>Step {step:,}, {_text(text)}</p>"


def _latest_texts(run: plot.Run) -> dict[str, tuple[int, str]]:
    texts = ((line["step"], *item) for line in run.lines for item in line.items() if isinstance(item[1], str))
    return {name: (step, text) for step, name, text in texts if name != metrics.SAMPLES}


def _settings(changed: dict[str, list[Any]]) -> str:
    rows = ([key, *(json.dumps(each, ensure_ascii=False) for each in pair)] for key, pair in sorted(changed.items()))
    return _table(["key", "default", "this run"], rows)


def _data(run: plot.Run) -> str:
    counts: Counter[tuple[str, ...]] = Counter()
    shares = {}
    for line in run.lines:
        for name, value in line.items():
            if not isinstance(value, int | float):
                continue
            if found := COUNT.fullmatch(name):
                counts[(found[1].replace("_", " "), found[2], found[3])] += value
            elif name.startswith("share/"):
                shares[name[6:]] = f"{value:.1%}"
    rows = ([dataset, f"{verb}: {cause}", count] for (verb, dataset, cause), count in sorted(counts.items()))
    left_out = (
        _table(["dataset", "what was not as it should be", "times"], rows) if counts else "<p>Nothing was left out.</p>"
    )
    shown = _table(["dataset", "share of the batches of the last epoch"], shares.items()) if shares else ""
    return shown + left_out


def _environment(about: dict[str, Any]) -> str:
    machine, packages = about["machine"], about["packages"]
    gpus = ", ".join(f"{count} × {name}" for name, count in Counter(machine["gpus"]).items())
    rows = {
        "machine": f"{machine['system']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        "GPUs": gpus or "none",
        "driver": machine["driver"],
        "processes": str(about["processes"]),
        "Python": about["python"],
        **{name: packages[name] for name in MAIN_PACKAGES if name in packages},
        **about["variables"],
    }
    parts = [_table(["", ""], ((name, value) for name, value in rows.items() if value))]
    for state in about["git"]:
        new = ", ".join(state["new_files"])
        shown = f"{state['folder']}: commit {state['commit']}, branch {state['branch'] or 'none'} {state['remote']}"
        parts.append(f"<p>{_text(shown)}</p>" + (f"<p class=soft>Not in git: {_text(new)}</p>" if new else ""))
        parts.append(_folded("Changes since the commit", state["diff"]) if state["diff"] else "<p>No changes.</p>")
    parts.append(_folded("All packages", "\n".join(f"{name}=={version}" for name, version in packages.items())))
    return "".join(parts)


def _again(about: dict[str, Any], config: str) -> str:
    command = shlex.join(about["command"])
    return (
        f"<pre>cd {_text(about['working_directory'])}\n{_text(about['again'])}</pre>"
        f"<p class=soft>It was started by: {_text(command)}</p>" + _folded(f"{CONFIG}: all settings", config)
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{_text(title)}</summary><pre>{_text(text)}</pre></details>"


def _table(head: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table whose first row is the head, unless that is empty. Numbers are to the right."""
    shown = [f"<tr>{''.join(f'<th>{_text(name)}</th>' for name in head)}</tr>"] if any(head) else []
    for row in rows:
        cells = (
            f"<td class=number>{each:,.6g}</td>" if isinstance(each, float) else
            f"<td class=number>{each:,}</td>" if isinstance(each, int) else f"<td>{_text(str(each))}</td>"
            for each in row
        )  # fmt: skip
        shown.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class=wide><table>{''.join(shown)}</table></div>" if shown else ""


def _text(text: str) -> str:
    return html.escape(str(text))
