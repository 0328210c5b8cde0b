"""Checks of the `run:` section: registered names, how long the run is, the output folder."""

import re
from collections.abc import Iterator
from pathlib import Path

from minigpt4.common.config_files import shipped_datasets
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import UnknownNameError, registry
from minigpt4.common.schema import AUTO
from minigpt4.common.text import pluralize
from minigpt4.common.trained_parts import rates_of_parts
from minigpt4.doctor.check_memory import trainable_parameters
from minigpt4.doctor.diagnostic import Diagnostic, error, ok, verdict, warning
from minigpt4.doctor.machine import free_disk, is_writable, readable
from minigpt4.doctor.run_context import RunContext

OUTPUT = "run.output_dir"
OTHER_OUTPUT = f"--options {OUTPUT}=/where/there/is/room"
# A checkpoint holds trained weights and AdamW's two averages, all in float32.
CHECKPOINT_BYTES_PER_PARAMETER = 12


def check_registry(context: RunContext) -> Iterator[Diagnostic]:
    """Schedule, runner and projector are registered, and processors can be made. Imports what registers them."""
    if not context.training:
        return
    run, datasets = context.run, context.cfg.datasets_cfg
    names = [("run.lr_sched", "lr_scheduler", run.lr_sched), ("run.runner", "runner", run.runner)]
    names += [("model.projector", "projector", context.model.projector)] if context.is_ours else []
    for key, kind, name in names:
        try:
            registry.get(kind, name)
        except UnknownNameError as mistake:
            yield error(key, str(mistake), "Change the name, or import the plug-in that registers it.")
    for dataset in sorted(datasets):
        yield from _check_dataset(context, dataset)
    yield from _check_splits(context)
    if not datasets:
        yield error("datasets", "there is none", "Add a section such as datasets: {cc_sbu_align: {...}}.")
    elif not sum(section.sample_ratio for section in datasets.values()):
        yield error("sample_ratio", f"it is 0 for every dataset ({', '.join(datasets)})", "Give one more than 0.")


def _check_splits(context: RunContext) -> Iterator[Diagnostic]:
    """The datasets of the package have the split "train", and "val" with `build_info.val`."""
    run, sections = context.run, context.cfg.datasets_cfg
    if not all(context.cfg.builder(name) in {*shipped_datasets(), "conversation"} for name in sections):
        return  # a plug-in may have others
    splits = ["train", *(["val"] if any(section.build_info.get("val") for section in sections.values()) else [])]
    for key in ("train_splits", "valid_splits", "test_splits"):
        unknown = [split for split in run[key] if split not in splits]
        if unknown or (key == "train_splits" and not run.train_splits and not run.evaluate):
            what, fix = f"{list(run[key])}, but the datasets have {splits}", f"--options run.{key}=[train]"
            if "val" in unknown:
                fix = f"--options datasets.{next(iter(sections), '…')}.build_info.val=0.02"
            yield error(f"run.{key}", what, fix)


def _check_dataset(context: RunContext, dataset: str) -> Iterator[Diagnostic]:
    """The processors of a dataset can be made, and its storage is named."""
    from minigpt4.datasets.builders.base_dataset_builder import BaseDatasetBuilder
    from minigpt4.datasets.builders.image_text_pair_builder import ImageTextPairBuilder
    from minigpt4.processors.base_processor import BaseProcessor, make_processor, processor_class

    builder = context.cfg.builder_class(dataset)
    if not issubclass(builder, BaseDatasetBuilder):
        return  # a plug-in may read the keys otherwise
    if issubclass(builder, ImageTextPairBuilder):
        made = builder(context.cfg.datasets_cfg[dataset])
        made.name = dataset
        for key, check in {"val": made.val, **({} if context.features(dataset) else {"storage": made.storage})}.items():
            try:
                check()
            except ConfigError as mistake:
                yield error(f"datasets.{dataset}.build_info.{key}", str(mistake))
    for section in ("text_processor", *(() if context.features(dataset) else ("vis_processor",))):
        for split, settings in (context.cfg.datasets_cfg[dataset][section] or {}).items():
            key = f"datasets.{dataset}.{section}.{split}"
            try:
                cls = processor_class(key, settings)
                if cls and issubclass(cls, BaseProcessor):
                    make_processor(key, settings)
            except (ConfigError, UnknownNameError) as mistake:
                key, what = re.match(r"([\w.-]+):? (.*)", str(mistake), re.DOTALL).groups()
                yield error(key, what)


def check_chat(context: RunContext) -> Iterator[Diagnostic]:
    """The image processor of a chat can be made."""
    from minigpt4.conversation.loading import load_vis_processor

    if not context.training:
        load_vis_processor(context.cfg)
        yield ok("vis_processor", "can be made")


def check_resume(context: RunContext) -> Iterator[Diagnostic]:
    """The run goes on from a checkpoint as it began. The model's own facts are compared when it is loaded."""
    from minigpt4.runners import checkpoints, resume
    from minigpt4.weights import checkpoint, locate

    key, source = "run.resume_ckpt_path", context.run.resume_ckpt_path
    if not context.training or context.run.evaluate or not source:
        return
    if source != AUTO and not locate.local_path(source).exists():
        return
    own = {resume.RANKS: context.world_size}
    path = checkpoints.find(context.run, lambda content: resume.differences(content, context.cfg, own)[0])
    if path is None:
        yield ok(key, f"auto: there is no checkpoint of this run in {context.run.output_dir}; a new run starts")
        return
    breaking, harmless = resume.differences(checkpoint.read_file(path), context.cfg, own)
    what = f"the run would not go on as it began: {'; '.join(breaking)}"
    if breaking and context.run.resume_anyway:
        yield warning(key, what, "run.resume_anyway=True lets it go on all the same.")
    elif breaking:
        yield error(key, what, "Take the checkpoint's values, or --options run.resume_anyway=True")
    else:
        yield ok(key, f"the settings are those of {path}" + "".join(f"; {line}" for line in harmless))


def check_length(context: RunContext) -> Iterator[Diagnostic]:
    """The run's length in steps, samples and time; the warm-up fits into an epoch."""
    run = context.run
    if not context.training or run.iters_per_epoch is None:
        return
    from minigpt4.runners.schedule import TrainingSchedule

    length = TrainingSchedule(
        run.batch_size_train,
        context.world_size,
        run.iters_per_epoch,
        run.max_epoch,
        run.accum_grad_iters,
        context.on_gpu,
    )
    duration = f"; {length.duration(context.step_time)} at {context.step_time} s a step" if context.step_time else ""
    yield ok("length", f"{length}{duration}")
    if run.warmup_steps > run.iters_per_epoch and run.max_epoch > 1:
        what = f"{run.warmup_steps} is longer than an epoch, {run.iters_per_epoch}: the next one warms up again"
        yield warning("run.warmup_steps", what, f"--options run.warmup_steps={run.iters_per_epoch}")


def check_trained_parts(context: RunContext) -> Iterator[Diagnostic]:
    """The settings of what trains, and how fast, go together."""
    parts = context.trained_parts
    if not context.training:
        return
    for part in rates_of_parts(context.run):
        if part not in parts.names:
            what = f"no parameter of it trains; these parts do: {', '.join(sorted(parts.names))}"
            yield error(f"run.lr_groups.{part}", what, f"Leave {part} out, or let it train (model.train).")
    yield ok("model.train", f"trains {', '.join(sorted(parts.names))}")


def check_output_folder(context: RunContext) -> Iterator[Diagnostic]:
    """The output folder can be written to."""
    folder = Path(context.run.output_dir).expanduser()
    if context.training and not is_writable(folder):
        yield error(OUTPUT, f"{folder.absolute()} cannot be written to", OTHER_OUTPUT)


def check_output_room(context: RunContext) -> Iterator[Diagnostic]:
    """The output folder has room for the checkpoints."""
    if not context.training:
        return
    folder = Path(context.run.output_dir).expanduser()
    each, free = CHECKPOINT_BYTES_PER_PARAMETER * trainable_parameters(context), free_disk(folder)
    what = f"{readable(free)} are free"
    if each:
        what = f"{pluralize(context.run.max_epoch, 'checkpoint')} of {readable(each)}, and {what}"
    yield verdict(free < each * context.run.max_epoch, OUTPUT, what, f"Make room, or {OTHER_OUTPUT}")
