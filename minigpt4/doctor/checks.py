"""All checks in stages. `doctor` runs them all; train.py and demo.py run most of them before weights are loaded.

A stage runs only if the stages before it found no error. The first stage does not import torch.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator

from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.doctor import (
    check_datasets,
    check_environment,
    check_files,
    check_memory,
    check_run,
    check_shapes,
    check_tokenizer,
)
from minigpt4.doctor.diagnostic import ERROR, NOT_MADE, OK, Diagnostic, as_text, error, warning
from minigpt4.doctor.machine import list_gpus
from minigpt4.doctor.run_context import RunContext

Check = Callable[[RunContext], Iterator[Diagnostic]]
Stage = tuple[Check, ...]

# Without torch, for any model.
QUICK: Stage = (
    check_files.check_paths,
    check_run.check_output_folder,
    check_environment.check_versions,
    check_environment.check_device,
    check_environment.check_gpu,
    check_environment.check_fp8,
    check_memory.check_host_memory,
)
# Without torch, for MiniGPT4.
QUICK_OF_MODEL: Stage = (
    check_files.check_headers,
    check_files.check_language_model,
    check_files.check_remote_code,
    check_files.check_downloads,
    check_shapes.check_image_settings,
    check_run.check_trained_parts,
    check_environment.check_optional_libraries,
    check_environment.check_trackers,
    check_environment.check_shared_memory,
)
# With torch, for any model.
RUN: Stage = (
    check_environment.check_torch_gpu,
    check_datasets.check_shards,
    check_datasets.check_records,
    check_datasets.check_cached_features,
    check_datasets.check_conversations,
    check_run.check_registry,
    check_run.check_resume,
    check_run.check_chat,
    check_run.check_length,
)
# With the loaders, for MiniGPT4: what can be read, then whether it fits together, then what it takes.
READ: Stage = (
    check_files.check_weights_files,
    check_files.check_numbers,
    check_files.check_language_model_contents,
    check_tokenizer.check_prompts,
)
FIT: Stage = (
    check_shapes.check_vision,
    check_shapes.check_checkpoints,
    check_tokenizer.check_tokenizer,
    check_tokenizer.check_fitting,
    check_tokenizer.check_samples,
)
ESTIMATE: Stage = (check_run.check_output_room, check_memory.check_gpu_memory)
# train.py and demo.py do these themselves, most of them before the model is loaded.
NOT_AT_START = (
    check_files.check_paths,
    check_files.check_numbers,
    check_tokenizer.check_fitting,
    check_tokenizer.check_samples,
    *RUN,
)
# Estimates must not keep a run from being tried.
ESTIMATED = ("GPU memory", "host memory")


def stages(context: RunContext) -> list[Stage]:
    """The stages for a run, in order."""
    if context.is_ours:
        return [QUICK + QUICK_OF_MODEL, RUN + READ, FIT, ESTIMATE]
    return [QUICK, RUN]


def examine(context: RunContext, to_run: Iterable[Stage] | None = None) -> list[Diagnostic]:
    """The diagnostics of all checks, or of the stages `to_run`, up to the first stage with an error."""
    found: list[Diagnostic] = []
    for stage in stages(context) if to_run is None else to_run:
        if has_errors(found):
            what = "the remaining checks (weights, shapes, tokenizer, memory) were skipped: the errors come first"
            found.append(warning("deeper checks", what, "Correct the errors and run doctor again."))
            break
        for check in stage:
            # Checks that need the same object, such as the vision side, may find the same mistake in it.
            found += [diagnostic for diagnostic in results(check, context) if diagnostic not in found]
    return found


def has_errors(diagnostics: Iterable[Diagnostic]) -> bool:
    return any(diagnostic.status == ERROR for diagnostic in diagnostics)


def results(check: Check, context: RunContext) -> list[Diagnostic]:
    """The diagnostics of one check. A ConfigError of the loaders becomes one, about the first key that it names.

    A check that fails itself gives a warning, so that the run can be tried.
    """
    found = []
    logging.disable(logging.WARNING)  # the loaders would log what they "load"
    try:
        for diagnostic in check(context):
            found.append(diagnostic)
    except ConfigError as mistake:
        key = re.search(r"(model|run|datasets)(\.\w+)+", str(mistake))
        name = key[0] if key else "config"
        found.append(error(name, str(mistake).removeprefix(f"{name}: ")))
    except Exception as problem:
        what = f"could not be made: {type(problem).__name__}: {problem}"
        found.append(warning(check.__name__.replace("_", " "), what, NOT_MADE))
    finally:
        logging.disable(logging.NOTSET)
    return found


def preflight(cfg: Config, training: bool, gpu: int | None = None, with_loaders: bool = False) -> list[Diagnostic]:
    """The quick checks, which do not import torch, or those that use the loaders; on rank 0 alone.

    gpu: the only one that is used. Returns the warnings. Raises ConfigError that lists the errors.
    """
    if int(os.environ.get("RANK", 0)):
        return []
    gpus = list_gpus()
    if gpu is not None:
        gpus = gpus[gpu : gpu + 1]
    processes, here = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    context = RunContext(cfg, training, gpus, processes, here)
    left_out = NOT_AT_START if gpus else (*NOT_AT_START, check_environment.check_gpu)  # the run reports a lack of GPUs
    quick, *deeper = (tuple(check for check in stage if check not in left_out) for stage in stages(context))
    found = examine(context, deeper if with_loaders else [quick])
    errors = [each for each in found if each.status == ERROR and each.check not in ESTIMATED]
    if errors:
        raise ConfigError("This cannot work; python -m minigpt4 doctor tells more.\n" + as_text(errors))
    return [each for each in found if each.status != OK]


def log_warnings(warnings: list[Diagnostic]) -> None:
    """Log the warnings of a preflight, once logging is set up."""
    for each in warnings:
        logging.warning("%s: %s. %s", each.check, each.what, each.fix)
