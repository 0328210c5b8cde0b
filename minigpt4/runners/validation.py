"""Evaluation of a run while it trains and at its end: when, by which metric, and what gets worse."""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from minigpt4.common import dist_utils
from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.datasets.seeding import seeded
from minigpt4.runners.checkpoints import BEST
from minigpt4.runners.restoring import load_weights
from minigpt4.runners.state import undisturbed
from minigpt4.weights import checkpoint

if TYPE_CHECKING:
    from minigpt4.common.config import Config
    from minigpt4.runners.runner_base import RunnerBase

KEY = "evaluation"
"""In a checkpoint: what was measured before training and with these weights."""
# A metric that gets worse by more is reported: in the units of tables; of the loss in per cent of its value.
MARGIN = 5.0
EARLIER = {"ckpt": "model.ckpt records", "start": "before training it was"}
# Runs that differ in these have no best metric in common.
COMPARED = {"valid_splits": [], "eval_task": None, "eval_samples": None, "best_metric": None}

Results = dict[str, dict[str, Any]]
"""By split: "figures" with the loss, "better" (`common.contracts.Scores`), "metric", the name of the one that decides;
with answers also "task" and "data"."""


def check_settings(cfg: "Config", datasets: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ConfigError for settings of evaluation that do not go together, or not with the data."""
    run = cfg.run_cfg
    lacking = [key for key in ("eval_every_steps", "eval_samples", "best_metric") if getattr(run, key) is not None]
    if lacking and not run.valid_splits and not run.evaluate:
        raise ConfigError(f"run.{lacking[0]} needs run.valid_splits, the splits to evaluate on. For example: [val]")
    if run.best_metric not in (None, "loss") and not run.eval_task:
        raise ConfigError(f"run.best_metric={run.best_metric} needs run.eval_task, whose metric it is: auto, or a name")
    if run.eval_task and run.valid_splits and not run.evaluate:
        with seeded(run.seed):  # what reading samples draws changes nothing else
            registry.get("scorer", "answers").check(cfg, datasets)


class Validation:
    """Evaluates `run.valid_splits` for a runner, and keeps its best checkpoint.

    Training goes on as if there had been none (`state.undisturbed`).
    """

    def __init__(self, runner: "RunnerBase") -> None:
        self.runner, self.run = runner, runner.run
        self.validated = True
        """Whether the weights of the last checkpoint were compared with the best, if that is due."""
        self.earlier: dict[str, Results] = {}  # by EARLIER; all later results are compared with them
        self.latest: Results = {}
        self._latest_step = -1
        self.scorer = None
        if self.run.eval_task and (self.run.valid_splits or self.run.test_splits):
            self.scorer = registry.get("scorer", "answers")(runner)

    def is_due(self) -> bool:
        """Whether `run.eval_every_steps` asks for an evaluation now."""
        return self.run.eval_every_steps is not None and self.runner.updates % self.run.eval_every_steps == 0

    def is_due_after(self, epoch: int) -> bool:
        """Whether an epoch, which has just ended, is followed by an evaluation."""
        by_epochs = (epoch + 1) % self.run.eval_every_epochs == 0 or epoch + 1 >= self.run.max_epoch
        return bool(self.run.valid_splits) and (by_epochs or self.is_due())

    def before_first_step(self) -> None:
        """Evaluate what a new run starts from, or what the run that is resumed has saved and not evaluated."""
        runner = self.runner
        if runner.step == 0:
            self.before_training()
        elif self.run.valid_splits and not self.validated:
            message = "%s %d is validated first: the run that is resumed has not."
            if runner.step % runner.iters_per_epoch == 0:
                logging.info(message, "Epoch", runner.epoch)
                self.after_epoch(runner.epoch)
            elif self.is_due():
                logging.info(message, "Step", runner.updates)
                self.within_epoch()
        self.validated = True

    def before_training(self) -> None:
        """Evaluate the weights that a new run starts from, if its evaluations are more than a loss after each epoch."""
        if self.run.valid_splits and (self.scorer or self.run.eval_every_steps):
            logging.info("Evaluation before training.")
            start = self._measure()
            self.earlier = {"ckpt": self._recorded_in_ckpt()}
            self._warn_of_drops()
            self.earlier["start"] = start

    def within_epoch(self) -> None:
        """Evaluate, and keep the weights if they are the best so far."""
        self.validated = False
        if self._evaluate(f"step {self.runner.updates}"):
            self.runner.saving.save_best()
        self.validated = True

    def after_epoch(self, epoch: int) -> None:
        """Evaluate, and save the epoch's checkpoint with the result."""
        is_best = self._evaluate(f"epoch {epoch}")
        self.validated = True
        self.runner.save_checkpoint(epoch, is_best)

    def of_test_splits(self) -> None:
        """Evaluate `run.test_splits` with the weights of the best checkpoint, if the run has one."""
        runner = self.runner
        with self._best_weights() if self.run.test_splits and not self.run.evaluate else nullcontext():
            for split in self.run.test_splits:
                runner.log_stats(split, {"loss": runner.evaluate(split)}, "test/")
                if self.scorer:
                    runner.log_stats(split, self.scorer.write(split, runner.output_dir / split), "test/")

    def wrote(self, line: Mapping[str, Any]) -> bool:
        """Whether a line of metrics.jsonl is of an evaluation."""
        starts = tuple(f"{split}_" for split in self.run.valid_splits)
        return any(name.startswith((*starts, "warning/", "eval_seconds")) for name in line)

    def state(self) -> dict[str, Any]:
        """The entry KEY of a checkpoint: earlier results, and those of the weights that are saved, if there are any."""
        return {"earlier": self.earlier, "results": self.latest if self._latest_step == self.runner.step else {}}

    def resume(self, content: Mapping[str, Any]) -> None:
        """Go on from a checkpoint: with its best metric, if this run has the same metric."""
        runner, recorded = self.runner, (content.get("config") or {}).get("run") or {}
        self.earlier = content.get(KEY, {}).get("earlier", {})
        if any(recorded.get(key, default) != getattr(self.run, key) for key, default in COMPARED.items()):
            self.validated = False
            return
        best = content.get("best_metric", runner.best_metric)
        runner.best_metric = best if math.isfinite(best) else runner.best_metric
        self.validated = content.get("validated", True)

    @contextmanager
    def _best_weights(self) -> Iterator[None]:
        """While entered, the model has the weights of the best checkpoint of the run, if there is one."""
        module, best = self.runner.module, self.runner.output_dir / BEST
        found = dist_utils.from_main(best.is_file)  # the other ranks may be on other disks
        which = best if found else f"the weights of the last epoch, since there is no {BEST}"
        logging.info("The test splits are measured with %s.", which)
        trained = list(checkpoint.trainable_parameters(module).values()) if found else []
        last = [parameter.detach().clone() for parameter in trained]
        if found:
            dist_utils.from_main(lambda: load_weights(self.runner, best) and None)
        dist_utils.broadcast_tensors(trained)
        yield
        for parameter, weight in zip(trained, last, strict=True):
            parameter.data.copy_(weight)

    def _evaluate(self, when: str) -> bool:
        """Measure and compare. Returns whether the weights are the best so far."""
        results = self._measure()
        self._warn_of_drops()
        values = {split: result["figures"][result["metric"]] for split, result in results.items()}
        signs = [-1 if result["better"][result["metric"]] == "lower" else 1 for result in results.values()]
        metric = sum(sign * value for sign, value in zip(signs, values.values(), strict=True)) / len(values)
        if all(result["metric"] == "loss" for result in results.values()):
            metric = self.runner.task.agg_metrics(-metric)
        # The metric of a loss that is not finite may be finite, and the best.
        broken = [name for name, value in {**values, "agg_metrics": metric}.items() if not math.isfinite(value)]
        if broken:
            logging.warning("Of %s, the result is not a number; %s is not compared.", ", ".join(broken), when)
        is_best = not broken and metric > self.runner.best_metric
        self.runner.best_metric = metric if is_best else self.runner.best_metric
        return is_best

    def _measure(self) -> Results:
        """Loss and scores of each split, which are logged."""
        run, runner, start = self.run, self.runner, time.perf_counter()
        samples = () if run.eval_samples is None else (run.eval_samples,)
        with undisturbed(runner.module):
            losses = {split: runner.evaluate(split, *samples) for split in run.valid_splits}
            scores = {split: self.scorer.measure(split) for split in run.valid_splits} if self.scorer else {}
        results: Results = {}
        for split, loss in losses.items():
            results[split] = _result(loss, scores.get(split), run.best_metric)
            runner.log_stats(split, results[split]["figures"])
        for split, each in scores.items():
            logging.info("%s: answers, each beside its first reference:\n%s", split, each["answers"])
            details = {f"{split}_{name}": value for name, value in each["details"].items()}
            pictures = {f"{split}_picture/{number}": picture for number, picture in each["pictures"].items()}
            runner.log({**details, f"{split}_answers": each["answers"], **pictures})
        if scores:
            runner.log({"eval_seconds": time.perf_counter() - start})
        self.latest, self._latest_step = results, runner.step
        return results

    def _recorded_in_ckpt(self) -> Results:
        """The scores that `model.ckpt` says its weights have, by the task and the questions."""
        path = self.runner.cfg.model_cfg.get("ckpt")
        with suppress(AttributeError):  # a file of another kind
            recorded = checkpoint.read_file(checkpoint.resolve(path)).get(KEY, {}) if path and self.scorer else {}
            return {split: each for split, each in recorded.get("results", {}).items() if each["metric"] != "loss"}
        return {}

    def _warn_of_drops(self) -> None:
        """Warn of metrics that are worse than earlier ones of the same questions, by more than the margin."""
        for source, earlier in self.earlier.items():
            known = {_asked(split, result): result for split, result in earlier.items()}
            for split, result in self.latest.items():
                before = known.get(_asked(split, result))
                name = before and before["metric"]
                if not before or name not in result["figures"]:
                    continue
                old, new = before["figures"][name], result["figures"][name]
                worse = new - old if result["better"][name] == "lower" else old - new
                margin, unit = (MARGIN * abs(old) / 100, "%") if name == "loss" else (MARGIN, "points")
                if worse > margin:
                    text = f"{split}: {name} is {new:.4g}; {EARLIER[source]} {old:.4g}. "
                    text += f"It is worse by more than {MARGIN:g} {unit}."
                    logging.warning("Step %d, %s", self.runner.step, text)
                    self.runner.log({f"warning/{split}_{name} since {source}": text})


def _asked(split: str, result: Mapping[str, Any]) -> Any:
    """Equal for results that can be compared: of the same questions, or of the loss of the same split."""
    return (result["task"], result["data"]) if "data" in result else split


def _result(loss: float, scores: Mapping[str, Any] | None, metric: str | None) -> dict[str, Any]:
    """The result of a split. metric: `run.best_metric`."""
    result = {"figures": {"loss": loss}, "better": {"loss": "lower"}, "metric": metric or "loss"}
    if scores:
        result["metric"] = metric or next(filter(scores["better"].get, scores["figures"]), "loss")
        result |= {key: result[key] | scores[key] for key in ("figures", "better")}
        result |= {key: scores[key] for key in ("task", "data")}
    return result
