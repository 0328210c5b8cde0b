"""The fewest tokens of an answer: neither a control token nor a stop text ends it earlier."""

import pytest
import torch

from minigpt4.models.generation import StopOnText
from minigpt4.models.sampling import MinNewTokens
from minigpt4.models.tokenizer import load_tokenizer


class Bytes:
    """A token for each byte, then `words`. `</s>` and `<s>` are control tokens."""

    bos_token_id, eos_token_id, unk_token_id = 256, 257, None
    special_tokens = {"<s>": 256, "</s>": 257, "<pad>": 258}

    def __init__(self, *words):
        self.pieces = [*(bytes([n]) for n in range(256)), b"<s>", b"</s>", b"<pad>", *(w.encode() for w in words)]

    def __len__(self):
        return len(self.pieces)

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids, skip_special_tokens=True):
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


def excluded(tokenizer, ids, *rows):
    """The tokens that are excluded after the new ids of one row."""
    scores = MinNewTokens(tokenizer, *rows)(torch.tensor([ids], dtype=torch.long), torch.zeros(1, len(tokenizer)))
    return {tokenizer.decode([i]) for i in scores[0].isneginf().nonzero().flatten().tolist()}


ENDS = {"</s>", "<pad>"}


@pytest.mark.parametrize(
    ("written", "least", "stops", "expected"),
    [
        ("", 0, ["##"], set()),
        ("", 1, ["##"], ENDS | {"x##y"}),
        ("a", 1, ["##"], set()),
        ("a", 2, ["##"], ENDS | {"x##y"}),
        ("a#", 3, ["##"], ENDS | {"x##y", "#", "#z"}),
        ("a#", 2, ["##"], {"#", "#z"}),  # only "a" would be left
        ("ab#", 2, ["##"], set()),
        ("", 1, [], ENDS),
        ("", 1, ["#", ""], ENDS | {"#", "x##y", "#z"}),
        ("ab", 5, ["bcd", "###"], ENDS),
        ("abc", 5, ["bcd", "###"], ENDS | {"d"}),
        ("<s>", 2, ["##"], ENDS | {"x##y"}),
    ],
)
def test_excluded_tokens(written, least, stops, expected):
    tokenizer = Bytes("x##y", "#z")
    ids = [256] if written == "<s>" else list(written.encode())
    assert excluded(tokenizer, ids, (least, stops)) == expected


def test_a_leading_bos_does_not_count():
    tokenizer = Bytes()
    assert "</s>" in excluded(tokenizer, [256, *b"ab"], (3, ["#"]))
    assert not excluded(tokenizer, [256, *b"abc"], (3, ["#"]))


def test_a_stop_text_that_is_written_byte_by_byte():
    tokenizer, stop = Bytes(), "。"
    begun = [97, *stop.encode()[:-1]]
    scores = MinNewTokens(tokenizer, (5, [stop]))(torch.tensor([begun]), torch.zeros(1, len(tokenizer)))
    assert scores[0, stop.encode()[-1]].isneginf() and not scores[0, stop.encode()[-1] + 1].isneginf()


def test_each_row_has_its_own():
    tokenizer = Bytes()
    shortest = MinNewTokens(tokenizer, (1, ["a"]), (0, []), (3, ["b"]))
    none = torch.empty(3, 0, dtype=torch.long)
    assert shortest(none, torch.zeros(3, 259)).isneginf().sum(dim=1).tolist() == [3, 0, 3]
    assert shortest(torch.tensor([[98]] * 3), torch.zeros(3, 259)).isneginf().sum(dim=1).tolist() == [0, 0, 3]


@pytest.mark.parametrize("stop", ["#", "##", "a#", "#a", "aa", "ab#a", "é", "aé"])
def test_no_text_ends_earlier(stop):
    """Random texts of few characters: a stop text is there only with the tokens before it."""
    tokenizer = Bytes("#a", "b##", "aa", "é")
    criterion = StopOnText(tokenizer, stop)
    random = torch.Generator().manual_seed(0)
    likely = torch.full((len(tokenizer),), -20.0)
    likely[[*b"ab#", *"é".encode(), *range(257, len(tokenizer))]] = 0
    for least in range(6):
        for _ in range(20):
            ids, shortest = [], MinNewTokens(tokenizer, (least, [stop]))
            while len(ids) < 40 and not (ids and (ids[-1] in (257, 258) or criterion.reached(ids))):
                scores = shortest(torch.tensor([ids], dtype=torch.long), likely[None])
                ids.append(torch.multinomial(scores.softmax(dim=1), 1, generator=random).item())
            written = tokenizer.decode(ids)
            starts = [len(tokenizer.decode(ids[:n])) for n in range(len(ids))]
            end = min([written.find(text) for text in (stop, "</s>", "<pad>") if text in written], default=len(written))
            assert sum(start < end for start in starts) >= least


def test_spaces_before_a_stop_text(golden_llm_folder):
    """SentencePiece drops the leading space of the first token; within a text the token holds it."""
    tokenizer = load_tokenizer(str(golden_llm_folder))
    for stop in ("###", " ###"):
        ids = tokenizer.encode("a") + tokenizer.encode(" ###")
        assert stop in tokenizer.decode(ids, skip_special_tokens=False)
        shortest = MinNewTokens(tokenizer, (len(ids), [stop]))
        assert shortest(torch.tensor([ids[:-1]]), torch.zeros(1, len(tokenizer)))[0, ids[-1]].isneginf()
