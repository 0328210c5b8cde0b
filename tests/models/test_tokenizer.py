"""The tokenizer segments like SentencePiece, as the slow tokenizer of transformers 4.28 did."""

import json

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from minigpt4.benchmarks import random_weights
from minigpt4.models.prompt import IMAGE_ID, encode_with_images
from minigpt4.models.tokenizer import SentencePieceTokenizer, load_tokenizer

TEXTS = ["describe this image in detail", "a red bus on the street", "###Human: what is it? ###Assistant: a bus"] * 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spm")
    SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder))


def test_a_tokenizer_model_is_read_by_sentencepiece(tokenizer):
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


@pytest.mark.parametrize("text", [" ###", "###Assistant: ", "</Img> Describe", "é 日本", "\n", "", " "])
def test_each_segment_is_sentencepieces_own(folder, tokenizer, text):
    oracle = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenizer.encode(text) == oracle.encode(text)


def test_every_segment_starts_with_the_dummy_prefix(folder, tokenizer):
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert [model.IdToPiece(i) for i in tokenizer.encode(" ###")] == ["▁", "▁###"]
    assert tokenizer.decode(tokenizer.encode(" ###")) == " ###"


def test_special_texts_become_their_ids(tokenizer):
    ids = tokenizer.encode("a bus</s>a bus<unk>")
    assert ids.count(2) == 1
    assert ids.count(0) == 1
    after = ids[ids.index(2) + 1 :]
    assert after[:-1] == tokenizer.encode("a bus")  # the text after it gets a dummy prefix of its own
    assert tokenizer.decode(ids) == "a bus a bus"


def test_added_tokens_of_vicuna_v0(folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": 32000}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert 32000 in tokenizer.encode("a [PAD]")
    assert "PAD" not in tokenizer.decode([*tokenizer.encode("a bus"), 32000])


def test_image_slots(tokenizer):
    ids = encode_with_images(tokenizer, "<Img><ImageHere></Img> a bus <ImageHere>", 4)
    assert ids[0] == 1
    assert ids.count(IMAGE_ID) == 8
    assert ids[-4:] == [IMAGE_ID] * 4
    assert ids.count(1) == 1


def test_a_gguf_file_has_the_same_tokenizer(tmp_path):
    """The token list of a .gguf file gives the same SentencePiece model as its tokenizer.model."""
    gguf = pytest.importorskip("gguf")
    folder = random_weights.write(tmp_path, "small", parts=("llm",))["llm"]
    model = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    checks = {3: model.IsControl, 2: model.IsUnknown, 5: model.IsUnused, 6: model.IsByte}
    ids = range(len(model))
    kinds = [next((kind for kind, is_kind in checks.items() if is_kind(i)), 1) for i in ids]
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.IdToPiece(i) for i in ids])
    writer.add_token_scores([model.GetScore(i) for i in ids])
    writer.add_token_types(kinds)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    expected, actual = load_tokenizer(str(folder)), load_tokenizer(str(tmp_path / "a.gguf"))
    assert isinstance(actual, SentencePieceTokenizer)
    assert (actual.bos_token_id, actual.eos_token_id, actual.unk_token_id) == (1, 2, 0)
    assert actual.special_tokens == expected.special_tokens
    for text in (" ###", "###Assistant: ", "</Img> Describe the  image", "\u00e9 \u65e5\u672c\n", "a</s>b", "   ", ""):
        assert actual.encode(text) == expected.encode(text)
        assert actual.decode(actual.encode(text)) == expected.decode(expected.encode(text))
