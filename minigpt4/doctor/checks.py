"""All checks in order, and their cheap part, which train.py and demo.py run before anything heavy."""

import logging
import os
from collections.abc import Callable, Iterator

from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.doctor import environment, estimate, files, names, shapes, texts
from minigpt4.doctor.case import RunContext
from minigpt4.doctor.findings import ERROR, OK, Diagnostic, as_text, warning
from minigpt4.doctor.machine import list_gpus

Check = Callable[[RunContext], Iterator[Diagnostic]]

# The model's files are looked into first: the other checks need them.
OF_MODEL: tuple[Check, ...] = (
    files.check_weights_files,
    files.check_language_model,
    files.check_downloads,
    shapes.check_image_size,
    shapes.check_encoder,
    shapes.check_qformer,
    shapes.check_projection,
    shapes.check_fingerprint,
    texts.check_template,
    texts.check_tokenizer,
    environment.check_optional_libraries,
    environment.check_shared_memory,
    estimate.check_gpu_memory,
)
OF_RUN: tuple[Check, ...] = (
    names.check_names,
    files.check_paths,
    files.check_shards,
    files.check_folder_dataset,
    files.check_features,
    files.check_output,
    environment.check_versions,
    environment.check_device,
    environment.check_gpu,
    environment.check_fp8,
    estimate.check_host_memory,
    estimate.check_length,
)
# An estimate must not keep a run from being tried.
ONLY_TOLD = (estimate.check_gpu_memory, estimate.check_host_memory)
# What train.py and demo.py do themselves before the model is loaded, and, without a GPU, say themselves.
NOT_AT_START = (
    names.check_names,
    files.check_paths,
    files.check_shards,
    files.check_folder_dataset,
    files.check_features,
    estimate.check_length,
)


def examine(case: RunContext) -> list[Diagnostic]:
    """What all checks find."""
    checks = (*OF_RUN, *OF_MODEL) if case.is_ours else OF_RUN
    return [finding for check in checks for finding in results(check, case)]


def results(check: Check, case: RunContext) -> Iterator[Diagnostic]:
    """What a check finds. One that fails itself says so, and keeps no run from being tried."""
    try:
        yield from check(case)
    except Exception as mistake:
        what = f"could not be made: {type(mistake).__name__}: {mistake}"
        yield warning(check.__name__.replace("_", " "), what, "This is a mistake of doctor's; please report it.")


def preflight(cfg: Config, training: bool, gpu: int | None = None) -> list[Diagnostic]:
    """The cheap part, on rank 0 alone; under a second. gpu: the only one that is used.

    Returns the warnings. Raises ConfigError that lists the errors.
    """
    if int(os.environ.get("RANK", 0)):
        return []
    gpus = list_gpus()
    processes, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    case = RunContext(cfg, training, gpus if gpu is None else gpus[gpu : gpu + 1], processes, here)
    left_out = NOT_AT_START if case.gpus else (*NOT_AT_START, environment.check_gpu)
    errors, warnings = [], []
    for check in (*OF_RUN, *(OF_MODEL if case.is_ours else ())):
        if check in left_out:
            continue
        for finding in results(check, case):
            if finding.status == ERROR and check not in ONLY_TOLD:
                errors.append(finding)
            elif finding.status != OK:
                warnings.append(finding)
    if errors:
        raise ConfigError("This cannot work; python -m minigpt4 doctor tells more.\n" + as_text(errors))
    return warnings


def log_warnings(warnings: list[Diagnostic]) -> None:
    """Log what `preflight` returned, once logging is set up."""
    for finding in warnings:
        logging.warning("%s: %s. %s", finding.check, finding.what, finding.fix)
