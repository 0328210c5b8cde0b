"""python -m minigpt4 data check|show|convert: look at datasets before a run, and write them in other forms.

    python -m minigpt4 data check /data/photos                             # a folder, files or shards
    python -m minigpt4 data check --cfg-path my_run.yaml --out report      # each dataset of a run
    python -m minigpt4 data show --cfg-path my_run.yaml --out samples.png  # samples as the model reads them
    python -m minigpt4 data convert my.csv --to shards --out /data/shards  # the same records in another form

Each of the three has its own --help; docs/own_data.md shows what they print.
"""

import argparse
import contextlib

from minigpt4.cli.arguments import add_config_arguments, add_files_arguments, columns_of, naming_flags
from minigpt4.common.commands import check_positive, command_parser, path_argument
from minigpt4.common.config import Config
from minigpt4.common.errors import ConfigError
from minigpt4.common.output import only_run
from minigpt4.common.text import pluralize
from minigpt4.data_tools.processes import available_cpus

MAX_SAMPLES = 200  # on a sheet
CHECK = """Read every record and picture, and say what is wrong with them.

The data are those of --cfg-path, or the files, folders and shards that are named. Exit status: 0 for no errors
(warnings are allowed), 1 for errors, and for data that cannot be opened at all.
"""
SHOW = """Draw samples as the model reads them: the processed pictures, and the text with what is learnt marked.

Without --cfg-path, the pictures and texts are those of the files, and the answers are marked.
"""
CONVERT = """Write the same records in another form, with their ids and their pictures as they are.

    shards   00000.tar …, for the builder conversation; captions also for laion and cc_sbu
    jsonl    00000.jsonl …, and the pictures in images/, each once

Of a config, each dataset gets a folder in --out. If it is interrupted, the same command goes on where it stopped.
"""


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command_parser("data", __doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="check|show|convert")
    check = add_action(actions, "check", CHECK)
    check.add_argument("--out", type=path_argument, metavar="FOLDER", help="write report.json and index.html there")
    add_workers(check)
    show = add_action(actions, "show", SHOW)
    show.add_argument("--out", required=True, type=path_argument, metavar="FILE.png", help="the picture to write")
    show.add_argument("--samples", type=int, default=8, metavar="N", help="samples of each dataset (%(default)s)")
    show.add_argument("--seed", type=int, default=0, metavar="N", help="draws the samples (%(default)s)")
    show.add_argument("--font", type=path_argument, metavar="FILE", help="a font with the characters of the texts")
    convert = add_action(actions, "convert", CONVERT)
    convert.add_argument("--to", required=True, choices=("shards", "jsonl"), help="the form")
    convert.add_argument("--out", required=True, type=path_argument, metavar="FOLDER", help="folder for the files")
    convert.add_argument("--leave-out", action="store_true", help="leave out records with a fault; else, they end it")
    add_workers(convert)
    args = parser.parse_args(argv)
    if bool(args.storage) == bool(args.cfg_path):
        actions.choices[args.action].error("name either files, folders or shards, or a config with --cfg-path")
    if args.cfg_path and (args.images or args.format or args.columns):
        actions.choices[args.action].error("--images, --format and --columns go with files; a config has its own")
    if getattr(args, "samples", 0) > MAX_SAMPLES:
        actions.choices[args.action].error(f"--samples {args.samples} must be at most {MAX_SAMPLES}")
    check_positive(parser, args, [name for name in ("workers", "samples") if hasattr(args, name)])
    return args


def add_action(actions, name: str, usage: str) -> argparse.ArgumentParser:
    """A parser for `data <name>` with the arguments that say which data."""
    summary = usage.partition("\n")[0]
    kind = argparse.RawDescriptionHelpFormatter
    parser = actions.add_parser(name, help=summary, description=usage, formatter_class=kind)
    parser.add_argument("storage", nargs="*", metavar="STORAGE", help="files, folders or shards, in place of a config")
    add_config_arguments(parser, "YAML file of a training run, whose datasets are meant", required=False)
    add_files_arguments(parser)
    return parser


def add_workers(parser: argparse.ArgumentParser) -> None:
    cpus = available_cpus()
    parser.add_argument("--workers", type=int, default=cpus, metavar="N", help="processes (%(default)s)")


def main(argv: list[str]) -> int:
    args = parse_args(argv)
    with contextlib.nullcontext() if args.cfg_path else naming_flags():
        return {"check": run_check, "show": run_show, "convert": run_convert}[args.action](args)


def run_check(args: argparse.Namespace) -> int:
    from minigpt4.data_tools import report
    from minigpt4.data_tools.check import check
    from minigpt4.data_tools.findings import ERROR, WARNING
    from minigpt4.data_tools.lengths import lengths_of
    from minigpt4.data_tools.pictures import opencv
    from minigpt4.data_tools.summary import as_text, count

    opencv()  # if it is missing, that is no fault of each picture
    if args.out:
        report.prepare(args.out)
    cfg, sources = open_sources(args)
    measure, note = lengths_of(cfg)
    reports = []
    for source in sources:
        reports.append(check(source, measure, args.workers))
        print(as_text(reports[-1]) + "\n")
    if note:
        print(note)
    print(f"{pluralize(count(reports, ERROR), 'error')}, {pluralize(count(reports, WARNING), 'warning')}.")
    if args.out:
        report.write(args.out, reports, note)
        print(f"The report is in {args.out / 'index.html'}")
    return int(count(reports, ERROR) > 0)


def run_show(args: argparse.Namespace) -> int:
    from minigpt4.data_tools.lengths import lengths_of
    from minigpt4.data_tools.opening import processor_of
    from minigpt4.data_tools.sheet import Fonts, draw_sheet, samples_of

    if args.out.exists():
        raise ConfigError(f"--out {args.out} exists. Nothing was changed. Name a new file.")
    fonts = Fonts(args.font)
    cfg, sources = open_sources(args)
    measure, note = lengths_of(cfg)
    datasets = []
    for source in sources:
        samples = [*samples_of(source, measure, processor_of(cfg, source), args.samples, args.seed)]
        datasets.append((f"{source.name}: {source.where}", samples))
        print(f"{source.name}: {pluralize(len(samples), 'sample')}")
    with only_run(args.out):
        draw_sheet(datasets, fonts).save(args.out, "PNG")
    if note:
        print(note)
    if fonts.missing:
        missing = "".join(sorted(fonts.missing))
        what = pluralize(len(missing), "character has", "characters have")
        print(f"{what} no glyph in the fonts: {missing[:40]}. Name a font that has them: --font FILE")
    return 0


def run_convert(args: argparse.Namespace) -> int:
    from minigpt4.data_tools.convert import SUFFIX_OF_FORM, convert, open_folder

    cfg, sources = open_sources(args)
    folders = [args.out if cfg is None else args.out / source.name for source in sources]
    for source, folder in zip(sources, folders, strict=True):
        open_folder(source, args.to, folder)
    with only_run(args.out):
        for source, folder in zip(sources, folders, strict=True):
            written = convert(source, args.to, folder, args.workers, args.leave_out)
            left_out = f", {pluralize(len(written.faults), 'fault')} left out" if written.faults else ""
            already = f", {pluralize(written.already, 'file')} there already" if written.already else ""
            print(f"{source.name}: {pluralize(written.records, 'record')} written{left_out}{already}. Train with")
            print(f"  builder: conversation, storage: {folder}/*.{SUFFIX_OF_FORM[args.to]}")
            for fault in written.faults[:5]:
                print(f"  left out: {fault.where} {fault.what}")
    return 0


def open_sources(args: argparse.Namespace) -> tuple[Config | None, list]:
    """The config, if one is named, and the datasets."""
    from minigpt4.data_tools.opening import source_of_files, sources_of_config

    if args.cfg_path:
        cfg = Config(args)
        if not cfg.datasets_cfg:
            raise ConfigError(f"{args.cfg_path} has no datasets.")
        return cfg, list(sources_of_config(cfg))
    info = {"images": args.images, "format": args.format, "columns": columns_of(args)}
    return None, [source_of_files(args.storage, info)]
