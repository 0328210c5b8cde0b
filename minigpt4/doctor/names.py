"""Checks of names: is there anything under them, of ours or of a plug-in's?"""

import re
from collections.abc import Iterator, Mapping

from minigpt4 import PACKAGE_ROOT
from minigpt4.common.config_files import shipped_datasets
from minigpt4.common.registry import HOMES, did_you_mean, registry
from minigpt4.doctor.case import RunContext
from minigpt4.doctor.findings import Diagnostic, error


def known(kind: str) -> list[str]:
    """What may be named: what `Config` has imported of plug-ins, and ours by the source, which would import torch."""
    home = PACKAGE_ROOT.joinpath(*HOMES[kind].split(".")[1:])
    files = home.glob("*.py") if home.is_dir() else [home.with_suffix(".py")]
    ours = (re.findall(rf"^@registry.register_{kind}\(\"(.+)\"\)", f.read_text("utf-8"), re.MULTILINE) for f in files)
    return sorted({*registry.registered(kind), *(name for names in ours for name in names)})


def check_names(case: RunContext) -> Iterator[Diagnostic]:
    """Schedule, runner and the processors of our datasets exist, for train.py."""
    if not case.training:
        return
    named = [("run.lr_sched", "lr_scheduler", case.run.lr_sched), ("run.runner", "runner", case.run.runner)]
    ours = case.cfg.datasets_cfg.keys() & shipped_datasets().keys()  # a plug-in's may read the keys otherwise
    for dataset in sorted(ours):
        for section in ("text_processor", *(() if case.features(dataset) else ("vis_processor",))):
            for split, settings in (case.cfg.datasets_cfg[dataset][section] or {}).items():
                if isinstance(settings, Mapping) and settings.get("name"):  # the builder names what has none
                    named.append((f"datasets.{dataset}.{section}.{split}.name", "processor", settings.name))
    for key, kind, name in named:
        names = known(kind)
        if name not in names:
            what = f"there is no {kind} {name!r}.{did_you_mean(name, names)} Known: {', '.join(names)}"
            yield error(key, what, "Change it there, or name the plug-in that registers it: --import my.module")
