"""The texts of the `tiny` default: short captions, full sentences, and the scoring of answers.

    concepts = load_concepts()
    short_caption(concept, rng)     # "Red apple."
    describe(concept, rng)          # "This picture shows a red apple. It has to do with fruit."
    named("It is a red apple.", "red apple")                            # True

Names and keywords are from Unicode's CLDR, in English; the wordings are in tiny_wordings.py. Pure Python.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import tiny_wordings as wordings

CONCEPTS_FILE = Path(__file__).resolve().parent / "tiny" / "concepts.json"
SINGULAR = {"This_is": "This is", "this_is": "this is", "Here_is": "Here is", "There_is": "There is",
            "there_is": "there is", "It": "It", "it_object": "it", "is": "is", "has": "has", "s": "s"}  # fmt: skip
PLURAL = {"This_is": "These are", "this_is": "these are", "Here_is": "Here are", "There_is": "There are",
          "there_is": "there are", "It": "They", "it_object": "them", "is": "are", "has": "have", "s": ""}  # fmt: skip
_HEAD_END = re.compile(
    r" (?:with|without|of|in|on|behind|from|for|at|to|over|showing|facing|wearing|pointing|tilted|lifting|holding) "
)


@dataclass(frozen=True)
class Concept:
    """A thing that all artists have drawn. `name` is CLDR's short name; no two concepts have the same caption."""

    id: str
    name: str
    keywords: tuple[str, ...]
    group: str
    subgroup: str


@lru_cache(maxsize=1)
def load_concepts() -> list[Concept]:
    """All concepts, sorted by id (hex code points, e.g. "1f34e"). Callers share the list: copy it to change it."""
    entries = json.loads(CONCEPTS_FILE.read_text(encoding="utf-8"))
    return [Concept(**{**entry, "keywords": tuple(entry["keywords"])}) for entry in entries]


@cache
def caption_of(name: str) -> str:
    """The name as a caption of stage 1, normalised by blip_caption, e.g. "keycap: 1" -> "keycap 1"."""
    return _blip_caption()(name)


@lru_cache(maxsize=1)
def _blip_caption() -> Callable[[str], str]:
    from minigpt4.processors.blip_processors import BlipCaptionProcessor  # imported here because it imports torch

    return BlipCaptionProcessor(max_words=1000)


# ---- Writing ---------------------------------------------------------------------------------------------------------


def short_caption(concept: Concept, rng: random.Random) -> str:
    """The name in one of several spellings. blip_caption makes the same caption of all of them."""
    name = concept.name
    return rng.choice([name, name, f"{name}.", _capitalised(name), f"{_capitalised(name)}.", f"{_capitalised(name)}!"])


def describe(concept: Concept, rng: random.Random) -> str:
    """One or two English sentences that contain `caption_of(concept.name)` and no other concept's name."""
    np, words = noun_phrase(concept), _some_keywords(concept, rng)
    openings, namings, combined = wordings.LABEL_OPENINGS, wordings.LABEL_NAMINGS, wordings.LABEL_COMBINED
    if np is not None:
        openings = openings + wordings.OPENINGS + wordings.GROUP_OPENINGS[concept.group]
        namings = namings + wordings.NAMINGS
        combined = combined + wordings.COMBINED
    more = wordings.TOPIC_FOLLOW_UPS + wordings.GROUP_FOLLOW_UPS[concept.group]
    more = more + wordings.WORD_FOLLOW_UPS if words else more
    plans = [[openings, more], [openings], [wordings.TOPIC_FIRST, namings], [combined]]
    plan = rng.choices(plans, weights=[5, 2, 2, 1])[0]
    text = " ".join(rng.choice(sentences) for sentences in plan)
    number = PLURAL if is_plural(concept) else SINGULAR
    return text.format(np=np, name=_spoken(concept), topic=wordings.TOPICS[concept.subgroup], words=words, **number)


def noun_phrase(concept: Concept) -> str | None:
    """The name with its article ("an ear of corn", "the sun", "jeans"), or None if it is only a label."""
    name = _spoken(concept)
    if name in wordings.LABELS or ":" in name:
        return None
    if name in wordings.DEFINITES or concept.subgroup == "keycap":
        return f"the {name}"
    if _takes_no_article(concept) or is_plural(concept):
        return name
    first = name.split()[0]
    vowel = first[0].lower() in "aeiou" and first not in wordings.A_BY_SOUND or first in wordings.AN_BY_SOUND
    return f"an {name}" if vowel else f"a {name}"


def is_plural(concept: Concept) -> bool:
    """Whether the name is a plural ("french fries", "women wrestling"), judged by its head noun."""
    name = _spoken(concept)
    if name in wordings.LABELS or name in wordings.DEFINITES or _takes_no_article(concept):
        return False
    words = _HEAD_END.split(name)[0].split()
    if words[0] in wordings.PLURAL_WITHOUT_S:
        return True
    return words[-1].endswith("s") and not words[-1].endswith("ss") and words[-1] not in wordings.SINGULAR_IN_S


def _takes_no_article(concept: Concept) -> bool:
    time_of_day = concept.name.endswith(("o’clock", "-thirty"))
    return time_of_day or concept.subgroup == "zodiac" or concept.name in wordings.BARE


def _spoken(concept: Concept) -> str:
    """The name within a sentence: without "!", and without the colon if it reads well without."""
    name = concept.name.replace("!", "").replace(": facing", " facing")
    return name.replace(":", "") if concept.subgroup == "keycap" else name


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:]


@cache
def _usable_keywords(concept: Concept) -> tuple[str, ...]:
    """CLDR's keywords, except words of the name, names of other concepts, abbreviations, and UNUSED_KEYWORDS."""
    taken = {caption_of(other.name) for other in load_concepts()} | set(caption_of(concept.name).split())
    taken |= wordings.UNUSED_KEYWORDS
    return tuple(
        word for word in concept.keywords
        if word.lower() not in taken and re.fullmatch(r"(?=.*[aeiouy])[^\W\d_]{3,}(?:-[^\W\d_]+)*", word)
    )  # fmt: skip


def _some_keywords(concept: Concept, rng: random.Random) -> str:
    """Two or three keywords as a phrase ("fruit, food and diet"), or "" if there are fewer than two."""
    usable = _usable_keywords(concept)
    if len(usable) < 2:
        return ""
    *first, last = rng.sample(usable, min(len(usable), rng.choice([2, 2, 3])))
    return f"{', '.join(first)} and {last}"


# ---- Scoring ---------------------------------------------------------------------------------------------------------


def exact(prediction: str, name: str) -> bool:
    """Whether the whole answer is the caption of the concept."""
    return prediction.strip() == caption_of(name)


def names_in(sentence: str) -> list[str]:
    """The captions of all concepts that a text names. "cat face" counts as itself only, not as "cat" too."""
    return _all_captions().findall(_blip_caption()(sentence))


def named(sentence: str, name: str) -> bool:
    """Whether a text names the concept, and not only another concept whose longer name contains its name."""
    return caption_of(name) in names_in(sentence)


def full_sentence(text: str) -> bool:
    """Whether a text is whole sentences: it begins with a capital, ends with a full stop, has no line break or ###."""
    text = text.strip()
    whole = re.fullmatch(r"[A-Z][^\n]*[^\s.]\.", text) is not None
    return whole and "###" not in text and len(text.split()) >= 3


@lru_cache(maxsize=1)
def _all_captions() -> re.Pattern:
    """A pattern that matches any concept's caption between word boundaries, the longest first."""
    captions = sorted((caption_of(concept.name) for concept in load_concepts()), key=len, reverse=True)
    return re.compile(rf"(?<![\w’-])(?:{'|'.join(map(re.escape, captions))})(?![\w’-])")
