"""Score a model's answers, or answers in a file, against references.

    python -m minigpt4 evaluate --cfg-path eval_configs/minigpt4_eval.yaml --data captions_val2014.json --out results
    torchrun --nproc_per_node 4 -m minigpt4 evaluate --cfg-path … --data QUESTIONS.json ANNOTATIONS.json --out results
    python -m minigpt4 evaluate --cfg-path my_run.yaml --out results           # the split val of its datasets
    python -m minigpt4 evaluate --answers answers.jsonl --data coco_pope_random.json --out results

The folder gets answers.jsonl, scores.json, answers.html, and table.md and table.tex. An interrupted run continues where
it stopped if it gets the same --out and settings. docs/evaluation.md describes the tasks and the forms of references.
"""

import argparse
import hashlib
import logging
from pathlib import Path

from minigpt4.cli import arguments
from minigpt4.cli.caption import settings_of
from minigpt4.common.commands import check_positive, command_parser, path_argument, text_argument
from minigpt4.common.config import Config
from minigpt4.common.config_files import import_plugins
from minigpt4.common.output import own_folder
from minigpt4.common.registry import registry
from minigpt4.common.resumable import check_output, open_output
from minigpt4.common.text import pluralize
from minigpt4.conversation.decoding import Decoding
from minigpt4.evaluation.example import Example

# The first file that this command writes into its folder.
MARK = "answers.jsonl.settings.json"


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command_parser("evaluate", __doc__)
    parser.add_argument("--answers", type=path_argument, metavar="FILE", help="answers to score, without a model")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="questions and references (a split of the config's)")
    parser.add_argument("--split", default="val", metavar="NAME", help="without --data: split to use (%(default)s)")
    arguments.add_files_arguments(parser)
    parser.add_argument("--task", metavar="NAME", help="what is measured (follows from the references)")
    parser.add_argument("--out", type=path_argument, required=True, metavar="FOLDER", help="where the results go")
    parser.add_argument("--name", metavar="TEXT", help="the model's name in tables (that of its file)")
    about = "with {} for the question; for pictures alone, the question"
    parser.add_argument("--prompt", type=text_argument, metavar="TEXT", help=about)
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="answers at a time (%(default)s)")
    arguments.add_model_arguments(parser, required=False)
    arguments.add_answer_arguments(parser, sample=False, settings=Decoding)
    args = arguments.parse(parser, argv, Decoding)
    if (args.cfg_path is None) == (args.answers is None):
        parser.error("give --cfg-path for a model, or --answers for answers that exist")
    if args.answers and not args.data:
        parser.error("--answers needs references: --data")
    check_positive(parser, args, ("batch_size",))
    return args


def main(argv: list[str]) -> int:
    """Score answers. Returns 1 if a model could not answer all questions."""
    args = parse_args(argv)
    from minigpt4.common.logger import setup_logger

    setup_logger()
    if args.answers:
        import_plugins(args.imports or [])
        return _score_file(args)
    cfg = Config(args)
    cfg.check_paths()
    return _score_model(args, cfg)


def _score_file(args: argparse.Namespace) -> int:
    from minigpt4.evaluation.answers import read_answers
    from minigpt4.evaluation.generate import entry
    from minigpt4.evaluation.results import ANSWERS, LINES, digest, write_results

    task, examples, _ = _examples(args, None)
    answers, others = read_answers(str(args.answers), examples)
    if others:
        logging.warning("%s: %s to no question of --data left out.", args.answers, pluralize(others, "answer"))
    content = hashlib.sha256(args.answers.read_bytes()).hexdigest()
    settings = {"answers": content[:16], "questions": digest(examples)}
    own_folder(args.out, MARK)
    with open_output(args.out / ANSWERS, settings, LINES) as output:
        new = [example for example in examples if example.id in answers and example.id not in output.done]
        output.write([entry(example, answers[example.id]) for example in new])
        print(write_results(args.out, args.name or args.answers.stem, task, examples, settings), end="")
    return 0


def _score_model(args: argparse.Namespace, cfg: Config) -> int:
    from minigpt4.common import dist_utils
    from minigpt4.conversation.loading import load_chat, select_gpu
    from minigpt4.datasets.seeding import seeded
    from minigpt4.evaluation.generate import answerer_of, check_prompt
    from minigpt4.evaluation.results import ANSWERS, LINES, digest, evaluate

    gpu = None if args.gpu_id is None else select_gpu(cfg, args.gpu_id)
    with dist_utils.process_group(cfg.run_cfg, gpu) as device:
        task, examples, dataset = _examples(args, cfg)
        check_prompt(args.prompt, examples)
        settings = settings_of(args, cfg)
        dist_utils.from_main(lambda: own_folder(args.out, MARK))
        asked = settings | {"questions": digest(examples)}
        # A mistake shows before the model is loaded.
        dist_utils.from_main(lambda: check_output(args.out / ANSWERS, asked, LINES))
        decoding = Decoding(**arguments.given(args, Decoding))
        with seeded(cfg.run_cfg.seed):  # weights that are in no file are the same each time, and on all ranks
            chat = load_chat(cfg, device)
        answerer = answerer_of(cfg, chat, dataset, args.prompt, decoding)
        name = args.name or Path(args.cfg_path).stem
        skipped = evaluate(answerer, task, examples, args.out, settings, name, args.batch_size)
        if dist_utils.is_main_process():
            print((args.out / "table.md").read_text(encoding="utf-8"), end="")
    return 1 if skipped else 0


def _examples(args: argparse.Namespace, cfg: Config | None) -> tuple[str, list[Example], str]:
    """The task, the examples, and the dataset that they are from, if they are from one of the config.

    Raises UnknownNameError for a task that there is not.
    """
    from minigpt4.evaluation import references

    if args.task:
        registry.get("eval_task", args.task)
    dataset = ""
    if args.data:
        columns = arguments.columns_of(args)
        with arguments.naming_flags():
            found, examples = references.read_examples(args.data, args.images, args.format, columns, cfg is not None)
    else:
        datasets = registry.get_task_class(cfg.run_cfg.task).setup_task(cfg=cfg).build_datasets(cfg)
        examples, dataset = references.examples_of_split(datasets, args.split)
        found = references.task_for(examples)
    if not args.task:
        logging.info("The references are for the task %s; --task names another.", found)
    return args.task or found, examples, dataset
