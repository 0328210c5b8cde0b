"""Planted failures are found, and sound answers are none."""

import random

import pytest

from minigpt4.evaluation.failures import KINDS, failures, in_sentences

SUBJECTS = ["a man", "the old dog", "two children", "a red bus", "some people", "a small boat", "the white cat"]
VERBS = ["stands", "waits", "rests", "is shown", "can be seen", "appears"]
PLACES = ["near the water", "on a wide street", "under a tree", "beside a wooden table", "in the snow", "at night"]
MORE = [
    "The colors are bright and the light is soft.", "Behind it, a row of houses leads to a hill.",
    "It looks calm, calm enough to sit down.", "In the background there are trees and a fence.",
    "The image has a warm mood!", "Nobody else is around: the place is empty.", "Is it winter? It seems so.",
    "A sign says \"Stop\".", "The shadows are long (it is late).", "There is a very, very long line of cars.",
]  # fmt: skip


def sound(rng: random.Random) -> str:
    first = f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(PLACES)}."
    return " ".join([first[0].upper() + first[1:], *rng.sample(MORE, rng.randint(0, 4))])


def planted(kind: str, rng: random.Random) -> tuple[str, bool]:
    """A failed answer, and whether its end sign was generated."""
    text = sound(rng)
    words = text.split()
    if kind == "no end sign":
        return text, False
    if kind == "repetition":
        sentence, phrase = text.split(". ")[0].rstrip(".") + ".", " ".join(words[:4])
        place, loop = rng.randint(1, 4), rng.choice(["and a dog", "the", "a very nice picture of"])
        looped = " ".join([*words[:place], *([loop] * rng.randint(3, 9)), *words[place:]])
        return rng.choice([f"{text} {sentence}", looped, f"{phrase} {phrase} {' '.join(words[4:])}"]), True
    if kind == "fragment":
        cut = rng.choice([["The", "picture", "shows", "a"], words[:3], ["There", "are", "trees,"], []])
        return rng.choice([f"{text} {' '.join(cut)}" if cut and cut != words[:3] else " ".join(cut), "", "..."]), True
    mark = rng.choice(["###Human: What is it?", "###", "Assistant: It is.", "</Img>", "<ImageHere>", "</s>", "[/INST]"])
    return rng.choice([f"{text} {mark}", f"{mark} {text}"]), True


def test_planted_failures_are_found():
    rng = random.Random(0)
    counts = {kind: {"right": 0, "missed": 0, "wrong": 0} for kind in (*KINDS, "any")}
    for number in range(1000):
        kind = KINDS[number // 2 % len(KINDS)] if number % 2 else None
        text, ended = planted(kind, rng) if kind else (sound(rng), rng.choice([True, None]))
        found = failures(text, ended)
        for each, count in counts.items():
            is_found, is_there = bool(found) if each == "any" else each in found, bool(kind) and each in (kind, "any")
            count["right"] += is_found and is_there
            count["missed"] += is_there and not is_found
            count["wrong"] += is_found and kind is None
    for kind, count in counts.items():
        assert count["right"] >= 100, (kind, count)
        assert count["right"] / (count["right"] + count["missed"]) >= 0.98, (kind, count)
        assert count["right"] / (count["right"] + count["wrong"]) >= 0.98, (kind, count)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("red apple", set()),
        ("a man on the", {"fragment"}),
        ("a man with a hat,", {"fragment"}),
        ("", {"fragment"}),
        ("dog dog dog", {"repetition"}),
        ("a dog and a dog", set()),
        ("Human: hello", {"template"}),
        ("a human: how nice", set()),
    ],
)
def test_captions_without_full_stops(text, found):
    """Where the references have no full stops, answers need none."""
    assert failures(text, True, sentences=False) == found


def test_the_references_say_whether_answers_are_sentences():
    assert in_sentences([["A dog.", "A cat"], ["It is red!"]])
    assert not in_sentences([["a dog", "a cat."], ["red apple"]])
