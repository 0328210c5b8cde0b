"""Evaluation tasks: from examples and answers to figures. `--task` selects one by its registered name.

A task of one's own is a class with the method `measure`, registered by `@registry.register("eval_task", "name")`.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minigpt4.common.errors import ConfigError
from minigpt4.common.registry import registry
from minigpt4.evaluation import captions, vqa
from minigpt4.evaluation.example import Answer, Example
from minigpt4.evaluation.failures import KINDS, failures, in_sentences
from minigpt4.evaluation.figures import Figure, mean

YES_OR_NO = re.compile(r"\b(yes|no|not)\b", re.IGNORECASE)


def _need(task: str, what: str, examples: Sequence[Example], has: Callable[[Example], Any]) -> None:
    """Raise ConfigError for the first example that does not have what a task needs."""
    for example in examples:
        if not has(example):
            raise ConfigError(f"--task {task} needs {what}, and question {example.id} has none. Name another task.")


def _failure_figures(answers: Sequence[Answer], sentences: bool | None) -> dict[str, Figure]:
    """The shares of failed answers; sentences: as for `failures`, None: answers are no sentences at all."""
    found = [failures(answer.text, answer.ended, bool(sentences)) for answer in answers]
    kinds = [kind for kind in KINDS if kind != "fragment" or sentences is not None]
    shares = {kind: mean([kind in each for each in found], flag=True, better="lower") for kind in kinds}
    return {"failures": mean([bool(each & set(kinds)) for each in found], better="lower"), **shares}


@registry.register("eval_task", "caption")
class CaptionTask:
    """Descriptions: CIDEr-D, BLEU, ROUGE-L and failures."""

    def measure(self, examples: Sequence[Example], answers: Sequence[Answer]) -> dict[str, Figure]:
        """The figures by name; the page sorts the answers by the first."""
        texts = [captions.words_of(answer.text) for answer in answers]
        references = [[captions.words_of(text) for text in example.references] for example in examples]
        return {
            "CIDEr-D": captions.cider_d(texts, references),
            **captions.bleu(texts, references),
            "ROUGE-L": captions.rouge_l(texts, references),
            "words": mean([len(text) for text in texts], scale=1, better=""),
            **_failure_figures(answers, in_sentences([example.references for example in examples])),
        }


@registry.register("eval_task", "vqa")
class VQATask:
    """Short answers to questions: VQA accuracy."""

    def measure(self, examples: Sequence[Example], answers: Sequence[Answer]) -> dict[str, Figure]:
        pairs = zip(answers, examples, strict=True)
        scores = [vqa.accuracy(answer.text, example.references) for answer, example in pairs]
        return {"accuracy": mean(scores), **_failure_figures(answers, None)}


@registry.register("eval_task", "yes_no")
class YesNoTask:
    """POPE: is it in the picture? An answer is no if its first sentence has the word no or not, and yes otherwise."""

    def measure(self, examples: Sequence[Example], answers: Sequence[Answer]) -> dict[str, Figure]:
        _need("yes_no", "the references yes or no", examples, lambda each: YES_OR_NO.search(each.references[0]))
        wanted = np.array([_says_yes(example.references[0]) for example in examples])
        found = np.array([_says_yes(answer.text) for answer in answers])
        clear = [YES_OR_NO.search(answer.text) is not None for answer in answers]
        both = found & wanted
        return {
            "accuracy": mean(found == wanted),
            "precision": Figure(np.stack([both, found], axis=1).astype(float)),
            "recall": Figure(np.stack([both, wanted], axis=1).astype(float)),
            "F1": Figure(np.stack([2 * both, found * 1 + wanted], axis=1).astype(float)),
            "yes rate": mean(found, better=""),
            "neither yes nor no": mean(~np.array(clear), flag=True, better="lower"),
            **_failure_figures(answers, None),
        }


def _says_yes(answer: str) -> bool:
    return re.search(r"\b(no|not)\b", answer.split(".")[0], re.IGNORECASE) is None


@registry.register("eval_task", "choice")
class ChoiceTask:
    """One of several answers, named by its letter or its text."""

    def measure(self, examples: Sequence[Example], answers: Sequence[Answer]) -> dict[str, Figure]:
        _need("choice", "choices", examples, lambda each: each.choices)
        chosen = [_choice(answer.text, example.choices) for answer, example in zip(answers, examples, strict=True)]
        right = [choice in example.references for choice, example in zip(chosen, examples, strict=True)]
        unclear = mean([choice is None for choice in chosen], flag=True, better="lower")
        return {"accuracy": mean(right), "no choice": unclear, **_failure_figures(answers, None)}


def _choice(answer: str, choices: Sequence[str]) -> str | None:
    """The choice that an answer names: by its letter first, then as the only one whose text it has."""
    letters = [chr(ord("A") + n) for n in range(len(choices))]
    named = re.match(r"\W*([A-Z])[.):,]|\W*([A-Za-z])\W*$", answer) or re.match(
        r"(?s:.*)\b(?i:answer|option|choice)\b:?(?:\s(?i:is|would be)\b)?\W*([A-Z])\b", answer
    )
    letter = named and named[named.lastindex].upper()
    if letter in letters:
        return choices[letters.index(letter)]
    text = f" {_plain(answer)} "
    equal = [choice for choice in choices if f" {_plain(choice)} " == text]
    within = equal or [choice for choice in choices if f" {_plain(choice)} " in text]
    return within[0] if len(within) == 1 else None


@registry.register("eval_task", "match")
class MatchTask:
    """Names: the answer is one of the references ("exact"), or has one in it ("mentioned").

    Case, white space and punctuation do not matter.
    """

    def measure(self, examples: Sequence[Example], answers: Sequence[Answer]) -> dict[str, Figure]:
        exact, mentioned = [], []
        for answer, example in zip(answers, examples, strict=True):
            text, names = _plain(answer.text), [_plain(reference) for reference in example.references]
            exact.append(text in names)
            mentioned.append(any(f" {name} " in f" {text} " for name in names))
        return {"exact": mean(exact), "mentioned": mean(mentioned), **_failure_figures(answers, None)}


def _plain(text: str) -> str:
    """A text in lower case, with one space between its words and no punctuation."""
    return " ".join(re.findall(r"\w+(?:['’.]\w+)*", text.lower()))
