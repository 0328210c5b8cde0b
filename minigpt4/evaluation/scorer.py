"""Answers of the model of a run, scored: while it trains, on fixed samples, and of `run.test_splits`."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt4.common import dist_utils
from minigpt4.common.config import Config
from minigpt4.common.contracts import Scores
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.conversation import Chat, Decoding
from minigpt4.datasets.splits import spread
from minigpt4.evaluation.example import Answer, Example
from minigpt4.evaluation.generate import Answerer, answerer_of, answers_of
from minigpt4.evaluation.page import thumbnail
from minigpt4.evaluation.references import examples_of_split, task_for
from minigpt4.evaluation.results import digest, evaluate
from minigpt4.evaluation.scores import measure
from minigpt4.fast.decoding.loop import CachedDecoding

SAMPLES = 200  # of each dataset, without `run.eval_samples`
SHOWN = 10  # answers

if TYPE_CHECKING:
    from minigpt4.runners import RunnerBase

Datasets = Mapping[str, Mapping[str, Any]]


@registry.register("scorer", "answers")
class AnswerScorer:
    """Asks a model the questions of splits, and scores its answers by `run.eval_task`. All ranks share the work."""

    def __init__(self, runner: "RunnerBase") -> None:
        """Raises ConfigError for a model without the members of `common.contracts.AnsweringModel`."""
        cfg, model = runner.cfg, runner.module
        if not hasattr(model, "context") or not hasattr(model, "llama_model"):
            raise ConfigError(
                f"run.eval_task={cfg.run_cfg.eval_task}: {type(model).__name__} writes no answers (it has no method "
                "context). Set run.eval_task=null."
            )
        self._runner, self._cfg, self._run, self._model = runner, cfg, cfg.run_cfg, model
        self._questions: dict[str, tuple[str, list[Example], Answerer]] = {}
        # Without CUDA graphs, which would be captured, and the layers compiled, in the middle of training.
        self._decoding_loop = CachedDecoding(graphs=False)
        self._shown: set[str] = set()  # splits whose pictures were returned

    @classmethod
    def check(cls, cfg: Config, datasets: Datasets) -> None:
        """Raise ConfigError for `run.valid_splits` that cannot be asked about, or not compared by `run.best_metric`."""
        for split in cfg.run_cfg.valid_splits:
            task, examples, _ = _questions(cfg, datasets, split)
            perfect = {example.id: Answer(example.references[0], True) for example in examples}
            figures = measure(task, examples, perfect)[1]
            known = ["loss", *(name for name, figure in figures.items() if figure.better and not figure.flag)]
            if cfg.run_cfg.best_metric not in (None, *known):
                raise ConfigError(
                    f"run.best_metric={cfg.run_cfg.best_metric} is no metric of the task {task} that has a better "
                    f"direction. Known: {', '.join(known)}."
                )

    def measure(self, split: str) -> Scores:
        """The scores of the answers to fixed samples of a split, the same on all ranks. The caller sets eval mode.

        Pictures are returned with the first scores of a split only.
        """
        if split not in self._questions:
            task, examples, dataset = _questions(self._cfg, self._runner.datasets, split)
            chat = Chat(self._model, None, self._runner.device, decoding_loop=self._decoding_loop)
            longest = min(getattr(self._model, "max_txt_len", Decoding.max_new_tokens), Decoding.max_new_tokens)
            decoding = Decoding(do_sample=False, max_new_tokens=longest)
            self._questions[split] = task, examples, answerer_of(self._cfg, chat, dataset, None, decoding)
        task, examples, answerer = self._questions[split]
        answers, skipped = answers_of(examples, answerer, self._run.batch_size_eval, self._runner.stop.until_stopped)
        self._decoding_loop.clear_cache(self._model.llama_model)  # training needs the memory
        self._runner.check_stop()
        if skipped:
            logging.warning("%s: without an answer, %d in all:\n  %s", split, len(skipped), "\n  ".join(skipped[:20]))
        return dist_utils.from_main(lambda: self._scores(split, task, examples, answers))

    def write(self, split: str, folder: Path) -> dict[str, float]:
        """Ask all questions of a split and write the results as `evaluate` does. Returns the figures, as in tables."""
        examples, dataset = examples_of_split(self._runner.datasets, split)
        task = _task(self._cfg, examples)
        chat = Chat(self._model, None, self._runner.device)
        answerer = answerer_of(self._cfg, chat, dataset, None, Decoding(do_sample=False))
        stopping = {"until_stopped": self._runner.stop.until_stopped, "check_stop": self._runner.check_stop}
        evaluate(answerer, task, examples, folder, {}, split, self._run.batch_size_eval, **stopping)
        if not dist_utils.is_main_process():
            return {}
        logging.info("%s: %s\n%s", split, task, (folder / "table.md").read_text(encoding="utf-8"))
        return _in_tables(json.loads((folder / "scores.json").read_text(encoding="utf-8"))["figures"])

    def _scores(self, split: str, task: str, examples: list[Example], answers: Mapping[str, Answer]) -> Scores:
        if not answers:
            raise ConfigError(f"run.eval_task: no question of the split {split} could be answered (see above).")
        scores, figures = measure(task, examples, answers)
        values, flags = _in_tables(scores["figures"]), [name for name, figure in figures.items() if figure.flag]
        details = {f"flags/{name}": values.pop(name) for name in flags}
        for group, each in scores.get("groups", {}).items():
            details |= {f"{name}/{group}": n for name, n in _in_tables(each["figures"]).items() if name in values}
        shown = [examples[index] for index in spread(len(examples), SHOWN)]
        pictures = {} if split in self._shown else _pictures(shown)
        self._shown.add(split)
        return {
            "task": task,
            "data": _identity(examples),
            "figures": values,
            "better": {name: figures[name].better for name in values},
            "details": details,
            "answers": "\n".join(_shown(n, each, answers.get(each.id)) for n, each in enumerate(shown, 1)),
            "pictures": pictures,
        }


def _questions(cfg: Config, datasets: Datasets, split: str) -> tuple[str, list[Example], str]:
    """The task, fixed examples of a split, and the first dataset that has it."""
    examples, dataset = examples_of_split(datasets, split, cfg.run_cfg.eval_samples or SAMPLES)
    return _task(cfg, examples), examples, dataset


def _task(cfg: Config, examples: list[Example]) -> str:
    return task_for(examples) if cfg.run_cfg.eval_task == "auto" else cfg.run_cfg.eval_task


def _identity(examples: list[Example]) -> str:
    """Equal for the same questions with the same references."""
    content = json.dumps([digest(examples), [example.references for example in examples]])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _pictures(examples: list[Example]) -> dict[str, Any]:
    """The first picture of each example, as a PIL image by the example's number."""
    found = {str(n): thumbnail(example.pictures[0]) for n, example in enumerate(examples, 1) if example.pictures}
    return {number: image for number, image in found.items() if image}


def _in_tables(figures: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The values of figures times their scales."""
    return {name: figure["value"] * figure["scale"] for name, figure in figures.items()}


def _shown(number: int, example: Example, answer: Answer | None) -> str:
    """An answer as a line, beside its question and its first reference."""
    question = f"{example.question} → " if example.question else ""
    text = "(none)" if answer is None else answer.text.strip() or "(nothing)"
    return " ".join(f"{number}. {question}{text}  [{example.references[0]}]".split())
