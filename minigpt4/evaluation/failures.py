"""Failed descriptions, as the paper counts them by eye: repeated, unfinished, broken off, or about the prompt.

The rules are ours. The paper had people judge 100 answers.
"""

import re
from collections import Counter
from collections.abc import Sequence

KINDS = ("repetition", "no end sign", "fragment", "template")

# Text of templates, which an answer must not show.
_MARKERS = re.compile(
    r"###|</?Img>|<ImageHere>|ImageContent|<image>|</?s>|\[/?INST\]|<</?SYS>>|<\|\w+\|>"
    r"|\b(?:Human|Assistant|USER|ASSISTANT)\s*:"
)
_END = re.compile(r"""[.!?…]["'”’)\]]*\s*$""")
# No sentence ends in one of these.
_OPEN_ENDS = set(
    "a an the and or but nor of with from into onto than as its their his her my your our is are was were "
    "because while which whose also very at for".split()
)
LONG = 4  # words: twice in a row is a repetition; of fewer words, three times
MANY = 6  # words: three times anywhere is a repetition


def failures(text: str, ended: bool | None, sentences: bool = True) -> set[str]:
    """The KINDS of failure of an answer.

    Args:
        ended: whether its end sign was generated; None, not known, is no failure.
        sentences: whether it has to end like a sentence.
    """
    found = {
        "repetition": _repeats(text),
        "no end sign": ended is False,
        "fragment": is_fragment(text, sentences),
        "template": _MARKERS.search(text) is not None,
    }
    return {kind for kind in KINDS if found[kind]}


def in_sentences(references: Sequence[Sequence[str]]) -> bool:
    """Whether most of the texts end like sentences."""
    ends = [_END.search(text) is not None for texts in references for text in texts]
    return sum(ends) * 2 > len(ends)


def is_fragment(text: str, sentences: bool) -> bool:
    """Whether an answer has no words, ends in the middle of a sentence, or, of `sentences`, without its full stop."""
    words = re.findall(r"\w+", text.lower())
    if not words or re.search(r"[,;:\-–—(\[]\s*$", text):
        return True
    ends = _END.search(text) is not None
    return not ends and (sentences or words[-1] in _OPEN_ENDS)


def _repeats(text: str) -> bool:
    """Whether a sentence of three words or more comes twice, or words follow themselves, or come three times."""
    sentences = Counter(" ".join(_words(sentence)) for sentence in re.split(r"[.!?\n]+", text))
    if any(times > 1 and sentence.count(" ") > 1 for sentence, times in sentences.items()):
        return True
    words = _words(text)
    counts = Counter(tuple(words[i : i + MANY]) for i in range(len(words) - MANY + 1))
    if any(times > 2 for times in counts.values()):
        return True
    some_twice = len({tuple(words[i : i + LONG]) for i in range(len(words) - LONG + 1)}) < len(words) - LONG + 1
    longest = len(words) // 2 if some_twice else LONG - 1
    return any(_follows_itself(words, n, 2 if n >= LONG else 3) for n in range(1, longest + 1))


def _follows_itself(words: list[str], n: int, times: int) -> bool:
    """Whether n words come so many times in direct succession."""
    run, needed = 0, n * (times - 1)
    for first, again in zip(words, words[n:], strict=False):
        run = run + 1 if first == again else 0
        if run == needed:
            return True
    return False


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'’]+", text.lower())
