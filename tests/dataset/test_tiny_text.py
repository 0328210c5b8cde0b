import random
import re
from collections import Counter

import pytest
import tiny_wordings as wordings
from tiny_text import (
    PLURAL,
    SINGULAR,
    caption_of,
    describe,
    exact,
    full_sentence,
    is_plural,
    load_concepts,
    named,
    names_in,
    noun_phrase,
    short_caption,
)

CONCEPTS = load_concepts()
BY_NAME = {concept.name: concept for concept in CONCEPTS}


def templates():
    for name, value in sorted(vars(wordings).items()):
        if isinstance(value, list):
            yield from value
        elif name in ("GROUP_OPENINGS", "GROUP_FOLLOW_UPS"):
            yield from (template for of_group in value.values() for template in of_group)


def test_a_name_identifies_a_concept():
    assert len(CONCEPTS) == 1594
    assert [concept.id for concept in CONCEPTS] == sorted({concept.id for concept in CONCEPTS})
    assert len({caption_of(concept.name) for concept in CONCEPTS}) == len(CONCEPTS)


def test_no_skin_tones_and_no_country_flags():
    assert not any(re.search("1f3f[b-f]", concept.id) for concept in CONCEPTS)
    assert not {"country-flag", "subdivision-flag"} & {concept.subgroup for concept in CONCEPTS}
    assert not any("skin tone" in concept.name for concept in CONCEPTS)


def test_every_group_and_subgroup_has_wordings():
    groups = {concept.group for concept in CONCEPTS}
    assert set(wordings.GROUP_OPENINGS) == set(wordings.GROUP_FOLLOW_UPS) == groups
    assert set(wordings.TOPICS) == {concept.subgroup for concept in CONCEPTS}


@pytest.mark.parametrize("table", ["LABELS", "DEFINITES", "BARE"])
def test_grammar_tables_list_names_that_exist(table):
    assert getattr(wordings, table) <= set(BY_NAME)


def test_every_description_is_a_full_sentence_that_names_its_concept_and_no_other():
    rng = random.Random(0)
    for concept in CONCEPTS:
        for _ in range(6):
            text = describe(concept, rng)
            assert full_sentence(text), text
            assert caption_of(concept.name) in caption_of(text), text
            assert names_in(text) == [caption_of(concept.name)], text
            assert not re.search(r"[{}#\n]|\bNone\b|  ", text), text
            assert len(text.split()) <= 50, text


def test_no_wording_and_no_topic_names_a_concept():
    for template in templates():
        for number in (SINGULAR, PLURAL):
            text = template.format(np="qqq", name="qqq", topic="qqq", words="qqq", **number)
            assert not names_in(text), text
            assert full_sentence(text), text
    assert not names_in(". ".join(wordings.TOPICS.values()))


def test_descriptions_have_very_many_wordings():
    rng = random.Random(1)
    skeletons = Counter()
    for concept in CONCEPTS:
        np = noun_phrase(concept) or concept.name
        for _ in range(3):
            text = describe(concept, rng).replace(np, "@").replace(wordings.TOPICS[concept.subgroup], "%")
            skeletons[re.sub(r"(words|such as|like|are|with) [\w-]+(, [\w-]+)? and [\w-]+\.", r"\1 &.", text)] += 1
    assert len(skeletons) > 1000
    assert skeletons.most_common(1)[0][1] < 0.02 * skeletons.total()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("red apple", "a red apple"),
        ("eggplant", "an eggplant"),
        ("ear of corn", "an ear of corn"),
        ("unicorn", "a unicorn"),
        ("ewe", "a ewe"),
        ("x-ray", "an x-ray"),
        ("SOS button", "an SOS button"),
        ("NEW button", "a NEW button"),
        ("UP! button", "an UP button"),
        ("O button (blood type)", "an O button (blood type)"),
        ("french fries", "french fries"),
        ("fleur-de-lis", "a fleur-de-lis"),
        ("man lifting weights", "a man lifting weights"),
        ("face blowing a kiss", "a face blowing a kiss"),
        ("sun", "the sun"),
        ("keycap: 1", "the keycap 1"),
        ("Mrs. Claus", "Mrs. Claus"),  # codespell:ignore claus
        ("Pisces", "Pisces"),
        ("two-thirty", "two-thirty"),
        ("man running: facing right", "a man running facing right"),
        ("person: blond hair", None),
        ("locked", None),
    ],
)
def test_articles(name, expected):
    assert noun_phrase(BY_NAME[name]) == expected


@pytest.mark.parametrize(
    ("name", "plural"),
    [
        ("grapes", True),
        ("women wrestling", True),
        ("people with bunny ears", True),
        ("busts in silhouette", True),
        ("woman’s clothes", True),
        ("bus", False),
        ("wine glass", False),
        ("bowl with spoon", False),
        ("person lifting weights", False),
        ("Aries", False),
        ("customs", False),
        ("children crossing", False),
    ],
)
def test_number(name, plural):
    assert is_plural(BY_NAME[name]) is plural


def test_plurals_get_plural_verbs():
    rng = random.Random(2)
    texts = [describe(BY_NAME["grapes"], rng) for _ in range(400)]
    assert any("These are grapes" in text for text in texts)
    assert not any(re.search(r"(This is|There is|Here is|a) grapes", text) for text in texts)


def test_keywords_left_out_stay_out():
    rng = random.Random(3)
    for concept in CONCEPTS:
        listed = re.search(r"words (?!that|for)(?:such as |like )?(.*)\.$", describe(concept, rng))
        words = re.split(r", | and ", listed[1]) if listed else []
        assert not {word.lower() for word in words} & wordings.UNUSED_KEYWORDS


def test_the_seed_decides_the_wording():
    concept = BY_NAME["red apple"]
    assert describe(concept, random.Random(7)) == describe(concept, random.Random(7))
    assert len({describe(concept, random.Random(seed)) for seed in range(40)}) > 30


def test_short_captions_differ_in_spelling_only():
    rng = random.Random(4)
    for concept in CONCEPTS:
        assert caption_of(short_caption(concept, rng)) == caption_of(concept.name)
    spellings = {short_caption(BY_NAME["red apple"], rng) for _ in range(100)}
    assert {"red apple", "Red apple."} <= spellings and len(spellings) >= 4


def test_exact():
    assert exact(" keycap 1\n", "keycap: 1")
    assert not exact("a red apple", "red apple")
    assert not exact("Red apple", "red apple")


@pytest.mark.parametrize(
    ("sentence", "name", "expected"),
    [
        ("This is a red apple, which has to do with fruit.", "red apple", True),
        ("This is Mrs. Claus.", "Mrs. Claus", True),  # codespell:ignore claus
        ("Here is a Japanese “reserved” button.", "Japanese “reserved” button", True),
        ("This picture shows a box.", "ox", False),
        ("This is a cat face.", "cat", False),
        ("This is a cat face.", "cat face", True),
        ("It is a T-Rex.", "T-Rex", True),
        ("", "cat", False),
    ],
)
def test_named(sentence, name, expected):
    assert named(sentence, name) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("This is a cat.", True),
        ("This is a cat. It has fur.", True),
        ("this is a cat.", False),
        ("This is a cat", False),
        ("This is a cat. It", False),
        ("This is a cat..", False),
        ("This is a cat.###", False),
        ("This is\na cat.", False),
        ("Cat.", False),
        ("", False),
    ],
)
def test_full_sentence(text, expected):
    assert full_sentence(text) is expected
