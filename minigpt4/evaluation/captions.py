"""Captions against references: words, BLEU, ROUGE-L and CIDEr-D.

Given the same words, the figures equal those of COCO's tool (the package pycocoevalcap). METEOR and SPICE need Java and
are not here.
"""

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from minigpt4.evaluation.figures import Figure, mean

Words = list[str]
ORDERS = (1, 2, 3, 4)  # of n-grams
SIGMA = 6.0  # CIDEr-D: of the penalty for another length, in words
BETA = 1.2  # ROUGE-L: weight of recall against precision
# COCO's tool has these in place of 0 matches and in the denominators of BLEU.
TINY, SMALL = 1e-15, 1e-9

_WORD = re.compile(
    r"""
    (?: [a-z]\. ){2,}                       # u.s., a.m.
    | (?: mr | mrs | ms | dr | st | vs | jr | sr ) \.   # abbreviations keep their full stop
    | \d+ (?: [.,:/] \d+ )*                 # 3.5, 1,000, 10:30, 1/2
      (?: [^\W\d_]+ )? (?: - \w+ )*         # 3d, 20th, 3-year-old
    | \w+? (?= n't \b )                     # do n't
    | n't \b
    | ' (?: s | re | ve | ll | d | m ) \b   # cat 's
    | \w+ (?: [-/]\w+ | '(?! (?: s | re | ve | ll | d | m ) \b ) \w+ )*  # t-shirt, man/woman, o'clock
    | [&$%#()]
    """,
    re.VERBOSE,
)
_WRITTEN = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "(": "-lrb-", ")": "-rrb-"}


def words_of(text: str) -> Words:
    """The words of a caption, in the manner of the Penn Treebank.

    All is in lower case. Contractions are two words (do n't, cat 's, can not); words with hyphens, numbers and
    abbreviations are one. Brackets are the words -lrb- and -rrb-; other punctuation is left out. On plain captions the
    words are those of the tokenizer of COCO's tool, which needs Java.
    """
    text = text.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return [part for word in _WORD.findall(text) for part in _WRITTEN.get(word, word).split()]


def ngrams(words: Words) -> Counter[tuple[str, ...]]:
    """Counts of all n-grams with n in ORDERS."""
    return Counter(tuple(words[i : i + n]) for n in ORDERS for i in range(len(words) - n + 1))


def bleu(answers: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, Figure]:
    """BLEU-1 to BLEU-4 of the whole corpus, with the closest length of a reference."""
    counts = np.array([_bleu_counts(answer, refs) for answer, refs in zip(answers, references, strict=True)], float)

    def upto(order: int):
        def combine(sums: np.ndarray) -> np.ndarray:
            matches, totals, length, wanted = sums[..., :4], sums[..., 4:8], sums[..., 8], sums[..., 9]
            precision = (matches[..., :order] + TINY) / (totals[..., :order] + SMALL)
            shortness = (length + TINY) / (wanted + SMALL)
            penalty = np.where(shortness < 1, np.exp(np.minimum(0, 1 - 1 / shortness)), 1)
            return np.exp(np.log(precision).mean(axis=-1)) * penalty

        return combine

    return {f"BLEU-{order}": Figure(counts, upto(order)) for order in ORDERS}


def _bleu_counts(answer: Words, references: Sequence[Words]) -> list[int]:
    """Matching n-grams of each order, all n-grams of each order, the answer's length, and the closest reference's."""
    most: Counter[tuple[str, ...]] = Counter()
    for reference in references:
        most |= ngrams(reference)
    matches = Counter(len(gram) for gram in (ngrams(answer) & most).elements())
    totals = [max(0, len(answer) - n + 1) for n in ORDERS]
    closest = min((abs(len(reference) - len(answer)), len(reference)) for reference in references)[1]
    return [*(matches[n] for n in ORDERS), *totals, len(answer), closest]


def rouge_l(answers: Sequence[Words], references: Sequence[Sequence[Words]]) -> Figure:
    """The mean F measure of the longest common subsequence; best precision and best recall over the references."""
    return mean([_rouge_l(answer, refs) for answer, refs in zip(answers, references, strict=True)])


def _rouge_l(answer: Words, references: Sequence[Words]) -> float:
    common = [_longest_common(answer, reference) for reference in references]
    precision = max(common) / len(answer) if answer else 0
    recall = max(n / len(ref) if ref else 0 for n, ref in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _longest_common(first: Words, second: Words) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        before = row
        row = [0]
        for other, (diagonal, above) in zip(second, pairwise(before), strict=True):
            row.append(diagonal + 1 if word == other else max(above, row[-1]))
    return row[-1]


def cider_d(answers: Sequence[Words], references: Sequence[Sequence[Words]]) -> Figure:
    """CIDEr-D; the frequencies of n-grams are those in the references, of which each example's are one document."""
    grams = [[ngrams(reference) for reference in refs] for refs in references]
    documents = Counter(gram for refs in grams for gram in set().union(*refs))
    log_n = np.log(len(references))

    def vector(counts: Counter) -> tuple[dict, list[float]]:
        """TF-IDF of each n-gram, and the length of the vector of each order."""
        weights = {gram: times * (log_n - np.log(max(1, documents[gram]))) for gram, times in counts.items()}
        squares = [0.0] * len(ORDERS)
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight**2
        return weights, [square**0.5 for square in squares]

    def similarity(answer: tuple, reference: tuple, delta: int) -> float:
        (mine, my_lengths), (theirs, their_lengths) = answer, reference
        products = [0.0] * len(ORDERS)
        for gram, weight in mine.items():
            if gram in theirs:
                products[len(gram) - 1] += min(weight, theirs[gram]) * theirs[gram]
        lengths = [a * b for a, b in zip(my_lengths, their_lengths, strict=True)]
        cosines = [product / length for product, length in zip(products, lengths, strict=True) if length]
        return sum(cosines) / len(ORDERS) * np.exp(-(delta**2) / (2 * SIGMA**2))

    scores = []
    for answer, refs, counted in zip(answers, references, grams, strict=True):
        mine = vector(ngrams(answer))
        # COCO's tool measures lengths in pairs of words.
        deltas = [max(0, len(answer) - 1) - max(0, len(reference) - 1) for reference in refs]
        pairs = zip(counted, deltas, strict=True)
        scores.append(10 * sum(similarity(mine, vector(ref), delta) for ref, delta in pairs) / len(refs))
    return mean(scores)
