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
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from minigpt4.cli import arguments
from minigpt4.cli.caption import settings_of
from minigpt4.common.commands import check_positive, command_parser, path_argument, text_argument
from minigpt4.common.config import Config
from minigpt4.common.config_files import import_plugins
from minigpt4.common.errors import ConfigError
from minigpt4.common.output import own_folder
from minigpt4.common.registry import registry
from minigpt4.common.resumable import Lines, open_output
from minigpt4.common.text import pluralize
from minigpt4.conversation.decoding import Decoding
from minigpt4.evaluation.example import Answer, Example

ANSWERS = "answers.jsonl"
LINES = Lines(
    "minigpt4 evaluate",
    "answer",
    b'{"id": ',
    lambda entry: entry["id"] if {"answer", "ended"} <= entry.keys() else None,
)


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = command_parser("evaluate", __doc__)
    parser.add_argument("--answers", type=path_argument, metavar="FILE", help="answers to score, without a model")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="questions and references (a split of the config's)")
    parser.add_argument("--split", default="val", metavar="NAME", help="without --data: split to use (%(default)s)")
    parser.add_argument("--images", type=path_argument, metavar="FOLDER", help="the pictures (the folder of --data)")
    parser.add_argument("--format", default="auto", metavar="NAME", help="of --data (recognised by its content)")
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

    task, examples = _examples(args, None)
    answers, others = read_answers(str(args.answers), examples)
    if others:
        logging.warning("%s: %s to no question of --data left out.", args.answers, pluralize(others, "answer"))
    content = hashlib.sha256(args.answers.read_bytes()).hexdigest()
    settings = {"answers": content[:16], "questions": _digest(examples)}
    own_folder(args.out, f"{ANSWERS}.settings.json")
    with open_output(args.out / ANSWERS, settings, LINES) as output:
        new = [example for example in examples if example.id in answers and example.id not in output.done]
        output.write([entry(example, answers[example.id]) for example in new])
        _write_results(args, task, examples, settings, args.answers.stem)
    return 0


def _score_model(args: argparse.Namespace, cfg: Config) -> int:
    from minigpt4.common import dist_utils
    from minigpt4.conversation.loading import load_chat, select_gpu
    from minigpt4.evaluation.generate import Answerer, answer_all, check_prompt
    from minigpt4.models.template import from_prompt

    gpu = None if args.gpu_id is None else select_gpu(cfg, args.gpu_id)
    with dist_utils.process_group(cfg.run_cfg, gpu) as device:
        task, examples = _examples(args, cfg)
        check_prompt(args.prompt, examples)
        settings = settings_of(args, cfg) | {"questions": _digest(examples)}
        if dist_utils.is_main_process():
            own_folder(args.out, f"{ANSWERS}.settings.json")
        with open_output(args.out / ANSWERS, settings, LINES) as output:
            chat = load_chat(cfg, device)
            keys = [cfg.model_cfg.get("prompt_template") or "{}", cfg.model_cfg.get("end_sym") or ""]
            template = getattr(chat.model, "template", None) or from_prompt(*keys)
            decoding = Decoding(**arguments.given(args, Decoding))
            answerer = Answerer(chat, template, args.prompt, decoding)
            skipped = answer_all(examples, answerer, output, args.batch_size)
            if dist_utils.is_main_process():
                _write_results(args, task, examples, settings, Path(args.cfg_path).stem)
    return 1 if skipped else 0


def _examples(args: argparse.Namespace, cfg: Config | None) -> tuple[str, list[Example]]:
    """The task and the examples. Raises UnknownNameError for a task that there is not."""
    from minigpt4.evaluation import references

    if args.task:
        registry.get("eval_task", args.task)
    if args.data:
        images = None if args.images is None else str(args.images)
        found, examples = references.read_examples(args.data, images, args.format, check=cfg is not None)
    else:
        examples = _split(cfg, args.split)
        found = references.task_for(examples)
    if not args.task:
        logging.info("The references are for the task %s; --task names another.", found)
    return args.task or found, examples


def _split(cfg: Config, split: str) -> list[Example]:
    """The examples of a split of the config's datasets."""
    from minigpt4.evaluation.references import from_dataset, with_unique_ids

    datasets = registry.get_task_class(cfg.run_cfg.task).setup_task(cfg=cfg).build_datasets(cfg)
    having = {name: splits[split] for name, splits in datasets.items() if split in splits}
    if not having:
        known = sorted({each for splits in datasets.values() for each in splits})
        raise ConfigError(
            f"--split {split}: no dataset has it (they have {', '.join(known)}). Name references with --data, or keep "
            "a share of a dataset back: build_info.val (docs/own_data.md)."
        )
    found = [example for name, dataset in having.items() for example in from_dataset(dataset, name)]
    return with_unique_ids(found)


def _digest(examples: Sequence[Example]) -> str:
    """Identifies the questions, wherever their pictures are."""
    digest = hashlib.sha256()
    for example in examples:
        pictures = [Path(picture).name for picture in example.pictures if isinstance(picture, str)]
        digest.update(json.dumps([example.id, example.messages, pictures]).encode())
    return f"{len(examples)}, {digest.hexdigest()[:16]}"


def _write_results(
    args: argparse.Namespace, task: str, examples: Sequence[Example], settings: dict, default_name: str
) -> None:
    """Score the answers of the folder: scores.json, the page and the tables; and print the table."""
    from minigpt4.evaluation.page import page
    from minigpt4.evaluation.scores import measure, table

    lines = (args.out / ANSWERS).read_bytes().splitlines() if (args.out / ANSWERS).exists() else []
    entries = {entry["id"]: entry for entry in map(json.loads, lines)}
    answered = [example for example in examples if example.id in entries]
    if not answered:
        raise ConfigError("There is no answer to score. The warnings above say why.")
    answers = {each.id: Answer(entries[each.id]["answer"], entries[each.id]["ended"]) for each in answered}
    scores, figures = measure(task, examples, answers)
    if scores["unanswered"]:
        logging.warning("%s without an answer left out.", pluralize(scores["unanswered"], "question"))
    name = args.name or default_name
    markdown, latex = table(scores, name)
    results = {
        "scores.json": json.dumps(scores | {"settings": settings}, indent=2, ensure_ascii=False) + "\n",
        "answers.html": page(name, scores, figures, answered, answers),
        "table.md": markdown,
        "table.tex": latex,
    }
    for file, text in results.items():
        part = args.out / f".{file}.part"
        part.write_text(text, encoding="utf-8", errors="backslashreplace")
        part.replace(args.out / file)
    print(markdown, end="")
    logging.info("Written to %s: %s.", args.out, ", ".join([ANSWERS, *results]))
