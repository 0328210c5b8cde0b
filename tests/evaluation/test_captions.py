"""BLEU, ROUGE-L and CIDEr-D, and the words that they count."""

import random

import pytest

from minigpt4.evaluation import captions

VOCABULARY = (
    "a the man woman dog cat red small large riding holding on with of street table near and two people sitting "
    "bench surfboard wave field"
).split()


def made(count: int) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Captions and one to five references each, of which the captions are altered copies."""
    rng = random.Random(0)
    answers, references = [], []
    for _ in range(count):
        scene = rng.choices(VOCABULARY, k=rng.randint(3, 14))
        texts = [[w if rng.random() > 0.3 else rng.choice(VOCABULARY) for w in scene] for _ in range(rng.randint(2, 6))]
        texts = [text[rng.randint(0, 2) : rng.randint(3, 14)] or ["a"] for text in texts]
        answers.append(texts[0])
        references.append(texts[1:])
    answers[7], answers[8], answers[9] = ["zebra"], ["a"] * 20, references[9][0]
    return answers, references


@pytest.fixture(scope="module")
def both():
    answers, references = made(500)
    joined = {n: [" ".join(words)] for n, words in enumerate(answers)}
    gold = {n: [" ".join(words) for words in refs] for n, refs in enumerate(references)}
    return answers, references, joined, gold


@pytest.mark.parametrize("count", [500, 3])
def test_bleu_equals_cocos(both, count):
    bleu = pytest.importorskip("pycocoevalcap.bleu.bleu")
    answers, references, joined, gold = both
    part = range(7, 7 + count) if count < 500 else range(500)  # the three have no 4-gram in common
    expected, _ = bleu.Bleu(4).compute_score({n: gold[n] for n in part}, {n: joined[n] for n in part}, verbose=0)
    ours = captions.bleu([answers[n] for n in part], [references[n] for n in part])
    assert [figure.value for figure in ours.values()] == pytest.approx(expected, abs=1e-6)
    assert expected[0] > 0.1


def test_rouge_l_equals_cocos(both):
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    answers, references, joined, gold = both
    expected, each = rouge.Rouge().compute_score(gold, joined)
    ours = captions.rouge_l(answers, references)
    assert ours.value == pytest.approx(expected, abs=1e-6) and expected > 0.1
    assert ours.each == pytest.approx(each, abs=1e-6)


def test_cider_d_equals_cocos(both):
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    answers, references, joined, gold = both
    expected, each = cider.Cider().compute_score(gold, joined)
    ours = captions.cider_d(answers, references)
    assert ours.value == pytest.approx(expected, abs=1e-6) and expected > 0.1
    assert ours.each == pytest.approx(each, abs=1e-6)


def test_an_answer_without_words_scores_nothing():
    answers, references = [[], ["a", "dog"]], [[["a", "cat"]], [["a", "dog"]]]
    assert captions.rouge_l(answers, references).each.tolist() == [0, pytest.approx(1)]
    assert captions.cider_d(answers, references).each[0] == 0
    assert 0 <= captions.bleu(answers, references)["BLEU-1"].value < 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man's dog.", "a man 's dog"),
        ("They don’t know; it isn't here!", "they do n't know it is n't here"),
        ("A black-and-white T-shirt (used)", "a black-and-white t-shirt -lrb- used -rrb-"),
        ("man/woman with mac & cheese, $5 or 50%", "man/woman with mac & cheese $ 5 or 50 %"),
        ("It is 3.5 m, 1,000 kg at 10:30 a.m.", "it is 3.5 m 1,000 kg at 10:30 a.m."),
        ("Mr. Smith cannot wait", "mr. smith can not wait"),
        ("a 3-year-old in 3D on the 20th", "a 3-year-old in 3d on the 20th"),
        ("two boys' bikes -- at 5 o'clock...", "two boys bikes at 5 o'clock"),
        ("Ein großes Café", "ein großes café"),
        ('"quoted", `text`\nnext line', "quoted text next line"),
        ("we'll they've I'm you'd he's", "we 'll they 've i 'm you 'd he 's"),
        ("...", ""),
    ],
)
def test_words(text, words):
    assert captions.words_of(text) == words.split()
