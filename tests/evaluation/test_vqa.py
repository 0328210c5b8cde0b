"""VQA accuracy against a plain reading of the rules on visualqa.org, and the other tasks' rules for answers."""

import random

import pytest

from minigpt4.evaluation import vqa

DIGITS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
APOSTROPHES = {
    "dont": "don't", "cant": "can't", "isnt": "isn't", "couldntve": "couldntve", "couldnt've": "couldn't've",
    "couldn'tve": "couldn't've", "yalld've": "yalld've", "y'alld've": "y'all'd've", "ow's'at": "'ow's'at",
    "twas": "'twas", "oclock": "o'clock", "lets": "lets", "shes": "shes", "somebody'd": "somebodyd", "youre": "you're",
}  # fmt: skip
SIGNS = [";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!"]
RULES = ("line", "sign", "joined sign", "grouped digits", "full stop", "decimal", "case", "digit", "article", "word")


def official(answer: str, hit: set[str]) -> str:
    """The published steps, one after the other. `hit` gets the rules that changed something."""
    text = ""
    for character in answer:
        text += " " if character in "\n\t" else character
    hit |= {"line"} if text != answer else set()
    text = text.strip(" ")
    comma = any(
        text[i] == "," and text[i - 1].isdigit() and text[i + 1].isdigit() for i in range(1, max(1, len(text) - 1))
    )
    out = text
    for sign in SIGNS:
        if sign not in text:
            continue
        neighbours = [text[i + d : i + d + 1] for i, c in enumerate(text) if c == sign for d in (-1, 1) if i + d >= 0]
        hit |= {"grouped digits" if comma else "sign" if " " in neighbours else "joined sign"}
        out = "".join("" if c == sign and (comma or " " in neighbours) else " " if c == sign else c for c in out)
    kept = ""
    for i, character in enumerate(out):
        if character == ".":
            hit |= {"decimal" if out[i + 1 : i + 2].isdigit() else "full stop"}
            if not out[i + 1 : i + 2].isdigit():
                continue
        kept += character
    hit |= {"case"} if kept != kept.lower() else set()
    words = []
    for word in kept.lower().split():
        hit |= {"digit"} if word in DIGITS else {"article"} if word in ("a", "an", "the") else set()
        word = DIGITS.get(word, word)
        if word not in ("a", "an", "the"):
            hit |= {"word"} if APOSTROPHES.get(word, word) != word else set()
            words.append(APOSTROPHES.get(word, word))
    return " ".join(words)


def official_accuracy(answer: str, references: list[str], hit: set[str]) -> float:
    answer, people = official(answer, hit), [official(reference, hit) for reference in references]
    parts = []
    for left_out in range(len(people)):
        others = people[:left_out] + people[left_out + 1 :]
        parts.append(min(1, others.count(answer) / 3))
    return sum(parts) / len(parts)


def phrase(rng: random.Random) -> str:
    pieces = ["red", "Dog", "U.S", "3.5", "1,000", "St.", "stop", "10:30", "The", "a", "an", *DIGITS, *APOSTROPHES]
    words = [rng.choice(pieces) for _ in range(rng.randint(1, 3))]
    text = rng.choice([" ", " ", "\n", "\t", rng.choice(SIGNS), f" {rng.choice(SIGNS)}"]).join(words)
    return rng.choice(["", "", " "]) + text + rng.choice(["", "", ".", "?", " !", rng.choice(SIGNS)])


def test_accuracy_equals_the_official_rule_on_500_cases():
    rng, hits, values = random.Random(0), [], set()
    for _ in range(500):
        known = [phrase(rng) for _ in range(rng.randint(1, 4))]
        references = [rng.choice(known) for _ in range(10)]
        answer = rng.choice([*known, *known, phrase(rng)])
        hit: set[str] = set()
        expected = official_accuracy(answer, references, hit)
        assert vqa.normalise(answer) == official(answer, hit)
        assert vqa.accuracy(answer, references) == pytest.approx(expected, abs=1e-12)
        hits.append(hit)
        values.add(round(expected, 2))
    assert {0.0, 0.3, 0.6, 0.9, 1.0} <= values
    for rule in RULES:
        assert sum(rule in hit for hit in hits) >= 10, rule


@pytest.mark.parametrize(("references", "right"), [(["yes"], 1), (["no", "yes"], 1), (["no"], 0)])
def test_any_of_few_references_is_right(references, right):
    assert vqa.accuracy("Yes.", references) == right
