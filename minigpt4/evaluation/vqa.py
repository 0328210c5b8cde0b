"""VQA accuracy, by the rules of visualqa.org."""

import re
from collections.abc import Sequence
from functools import cache, lru_cache

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = {"a", "an", "the"}
NUMBERS = dict(zip("zero one two three four five six seven eight nine ten".split(), map(str, range(11)), strict=True))
NUMBERS["none"] = "0"
# A word that lacks one of these apostrophes gets it.
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
AGREEMENT = 3  # answers of other people that make an answer right


@cache
def _with_apostrophes() -> dict[str, str]:
    """{the word without one of its apostrophes: the word}."""
    found = {"somebody'd": "somebodyd"}  # the official table has this one the other way round
    for word in CONTRACTIONS:
        for place in (match.start() for match in re.finditer("'", word)):
            found[word[:place] + word[place + 1 :]] = word
    return found


@lru_cache(maxsize=100_000)
def normalise(answer: str) -> str:
    """An answer as it is compared.

    In lower case; full stops left out except before digits; other punctuation replaced by a space, or left out where a
    space is beside it or a comma stands between digits; numbers up to ten as digits; without articles; with the
    apostrophes of contractions.
    """
    text = re.sub(r"[\n\t]", " ", answer).strip()
    grouped = re.search(r"\d,\d", text) is not None
    result = text
    for sign in PUNCTUATION:
        beside_space = f"{sign} " in text or f" {sign}" in text
        result = result.replace(sign, "" if grouped or beside_space else " ")
    result = re.sub(r"\.(?!\d)", "", result)
    words = [NUMBERS.get(word, word) for word in result.lower().split()]
    return " ".join(_with_apostrophes().get(word, word) for word in words if word not in ARTICLES)


def accuracy(answer: str, references: Sequence[str]) -> float:
    """The mean over the people of min(1, equal answers of the other people / 3).

    Of fewer than four references, each is right.
    """
    answer = normalise(answer)
    equal = [normalise(reference) == answer for reference in references]
    if len(equal) <= AGREEMENT:
        return float(any(equal))
    return sum(min(1.0, (sum(equal) - own) / AGREEMENT) for own in equal) / len(equal)
