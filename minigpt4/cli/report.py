"""python -m minigpt4 report: write report.html into the folder of a run.

    python -m minigpt4 report output/minigpt4_tiny_stage1_pretrain/20261130143043

A run writes its report itself when it ends (run.report). This command is for a run that goes on, or was stopped.
"""

from pathlib import Path

from minigpt4.common.commands import command_parser, path_argument
from minigpt4.common.errors import ConfigError


def main(argv: list[str]) -> int:
    """Write reports. Raises ConfigError for a folder that is no run's."""
    parser = command_parser("report", __doc__)
    parser.add_argument("runs", nargs="+", type=path_argument, metavar="RUN", help="folder of a run")
    from minigpt4.tracking import metrics, run_files
    from minigpt4.tracking.report import write_report

    folders: list[Path] = parser.parse_args(argv).runs
    for folder in folders:
        for name in (metrics.NAME, run_files.CONFIG, run_files.ENVIRONMENT):
            if not (folder / name).is_file():
                raise ConfigError(f"{folder} is no folder of a run: it has no {name}.")
    written = [write_report(folder) for folder in folders]
    for path in filter(None, written):
        print(path)
    return int(None in written)
