"""Train MiniGPT-4.

    torchrun --nproc_per_node 4 train.py --cfg-path train_configs/minigpt4_stage1_pretrain.yaml
    torchrun --nproc_per_node 1 train.py --cfg-path train_configs/minigpt4_stage2_finetune.yaml
    python train.py --cfg-path train_configs/minigpt4_tiny_stage1_pretrain.yaml      # one process, CPU or GPU

Any key of the YAML files can be given on the command line:

    … --options run.batch_size_train=8 model.llama_model=/weights/vicuna-7b
"""

import argparse
import logging
import sys

from minigpt4.cli.arguments import add_config_arguments
from minigpt4.common.commands import accept_any_text, check_dashes
from minigpt4.common.config import Config
from minigpt4.common.failing import failure_text
from minigpt4.common.stopping import STOP, Stopped, leave
from minigpt4.doctor.checks import log_warnings, preflight


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser, "the run's YAML file")
    parser.add_argument("--offline", action="store_true", help="fetch nothing; a file that is not cached is an error")
    check_dashes(sys.argv[1:] if argv is None else argv)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Read the config, build task, datasets and model, and run."""
    accept_any_text()
    cfg = Config(parse_args(argv))
    cfg.check_paths(datasets=True)
    warnings = preflight(cfg, training=True)

    # Imported late: a mistake in the config is reported before torch and transformers are loaded.
    from minigpt4.common import dist_utils
    from minigpt4.common.logger import kept_console, setup_logger
    from minigpt4.common.registry import registry
    from minigpt4.runners.folder import folder_of, reserved_folder
    from minigpt4.runners.state import seed_everything
    from minigpt4.tracking.report import write_report
    from minigpt4.tracking.run_files import write_run_files

    setup_logger()
    with (
        STOP,
        kept_console() as write_console_to,
        dist_utils.process_group(cfg.run_cfg),
        reserved_folder(cfg.run_cfg.output_dir) as job_id,
    ):
        log_warnings(warnings + preflight(cfg, training=True, with_loaders=True))
        seed_everything(cfg.run_cfg.seed)  # the same on all ranks, so that random weights are equal
        cfg.pretty_print()
        task = registry.get_task_class(cfg.run_cfg.task).setup_task(cfg=cfg)
        runner_class = registry.get_runner_class(cfg.run_cfg.runner)
        registry.get_lr_scheduler_class(cfg.run_cfg.lr_sched)  # reports a misspelt name before anything is loaded
        if cfg.run_cfg.eval_task not in (None, "auto"):
            registry.get("eval_task", cfg.run_cfg.eval_task)
        datasets = task.build_datasets(cfg)
        if hasattr(runner_class, "check_data"):
            runner_class.check_data(cfg, datasets)
        model = task.build_model(cfg)
        seed_everything(cfg.run_cfg.seed + dist_utils.get_rank())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logging.info("number of trainable parameters: %d", trainable)
        runner = runner_class(cfg, task, model, datasets, job_id)
        folder = folder_of(cfg.run_cfg.output_dir, job_id)
        dist_utils.from_main(lambda: write_run_files(cfg, folder, dist_utils.get_world_size()))
        if dist_utils.is_main_process():
            write_console_to(folder / "console.log")
        try:
            runner.train()
        except KeyboardInterrupt as stop:
            logging.info("Stopped by %s. %s", stop if isinstance(stop, Stopped) else "Ctrl-C", how_to_go_on(runner))
            raise
        if cfg.run_cfg.report and dist_utils.is_main_process() and (page := write_report(folder)):
            logging.info("The report of the run is %s.", page)


def how_to_go_on(runner) -> str:
    """How to continue a run that was stopped, in a sentence."""
    saved = getattr(runner, "last_checkpoint", None)
    if saved is None:
        return "It had saved no checkpoint yet."
    return f"To go on: --options run.resume_ckpt_path={saved}"


if __name__ == "__main__":
    try:
        main()
    except Stopped as stop:
        leave(stop.status)
    except KeyboardInterrupt:
        sys.exit(130)  # as a shell reports Ctrl-C
    except Exception as error:
        sys.exit(failure_text(error))
