"""Conversations as training batches: the tokens that are learnt, cuts, and the same loss in every form."""

import random
from dataclasses import replace

import pytest
import torch
from conversation_cases import CHATML, TOKENIZERS, random_conversation, renderer

from minigpt4.datasets.conversations.batch import Conversations, encode, exchanges
from minigpt4.fast.packing.batch import pack
from minigpt4.models.prompt import IGNORE_INDEX, IMAGE_ID, TextSettings
from minigpt4.models.template import TEMPLATES, from_chat_template

V0 = TEMPLATES["vicuna_v0"]
QUERIES = 8
LONG = 10**6


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_answers_are_learnt_and_nothing_else(kind, template):
    tokenizer, template, rng = TOKENIZERS[kind](), TEMPLATES[template], random.Random(0)
    for _ in range(350):
        (conversation,) = Conversations([random_conversation(rng)]).sanitize(
            tokenizer.special_tokens, template.separators
        )
        parts = [*exchanges(conversation, template, "")]
        found = encode(tokenizer, parts, TextSettings(QUERIES, LONG, "", template))
        runs, previous = [], IGNORE_INDEX
        for token, label in zip(found.ids, found.labels, strict=True):
            assert label in (token, IGNORE_INDEX)
            if label != IGNORE_INDEX:
                runs += [[]] if previous == IGNORE_INDEX else []
                runs[-1].append(label)
            previous = label
        assert [tokenizer.decode(run, skip_special_tokens=False) for run in runs] == [answer for _, answer in parts]
        images = sum(parts.count(None) for _, parts in conversation)
        assert (found.num_images, found.cut) == (images, False)
        assert found.ids.count(IMAGE_ID) == images * QUERIES


@pytest.mark.parametrize("template", [*TEMPLATES.values(), from_chat_template(renderer(CHATML), "<|im_end|>")])
def test_all_texts_but_the_first_question_are_learnt(tokenizer, template):
    """Where they are asked for; images never are, and the ids are the same."""
    rng = random.Random(0)
    for _ in range(30):
        parts = [*exchanges(random_conversation(rng), template, "")]
        for room in (LONG, 40):
            settings = TextSettings(QUERIES, room, "", template)
            default = encode(tokenizer, parts, settings)
            all_texts = encode(tokenizer, parts, replace(settings, learn_on="all"))
            start = next(i for i, label in enumerate(default.labels) if label != IGNORE_INDEX)
            assert all_texts._replace(labels=default.labels) == default
            after = [IGNORE_INDEX if i == IMAGE_ID else i for i in default.ids[start:]]
            assert all_texts.labels == [IGNORE_INDEX] * start + after
            learnt = [label for label in default.labels[start:] if label != IGNORE_INDEX]
            assert (len(learnt) < len(after)) == (len(parts) > 1 and len(default.ids) > start + len(learnt))


@pytest.fixture
def tokenizer():
    return TOKENIZERS["SentencePiece"]()


def tokens_of(tokenizer, *messages, max_txt_len=LONG):
    roles = ("user", "assistant") * 9
    conversation = tuple((role, parts) for role, parts in zip(roles, messages, strict=False))
    return encode(tokenizer, exchanges(conversation, V0, "P"), TextSettings(QUERIES, max_txt_len, "", V0))


def test_a_cut_conversation(tokenizer):
    """It ends inside of an answer or before a question, with at least one label."""
    messages = [(None, "What?"), ("a dog",), ("And", None, "here?"), ("two red cats",)]
    first, both = tokens_of(tokenizer, *messages[:2]), tokens_of(tokenizer, *messages)
    answer = sum(label != IGNORE_INDEX for label in first.labels)
    question = len(both.ids) - len(first.ids) - (sum(label != IGNORE_INDEX for label in both.labels) - answer)
    for room in range(1, len(both.ids) + 2):
        cut = tokens_of(tokenizer, *messages, max_txt_len=room)
        assert cut.ids == both.ids[: len(cut.ids)] and cut.labels == both.labels[: len(cut.ids)]
        assert cut.labels[-1] != IGNORE_INDEX and cut.cut == (len(cut.ids) < len(both.ids))
        assert cut.num_images == cut.ids.count(IMAGE_ID) / QUERIES == (2 if room > answer + question else 1)
        after_first_question = len(cut.ids) - (len(first.ids) - answer)
        assert after_first_question <= room


def test_a_caption_equals_a_conversation_of_one_image(build_golden_model):
    """The same loss, bit for bit, with the same prompt; so does the prompt as a question."""
    model = build_golden_model(prompt_template="###Human: {} ###Assistant: ", end_sym="###", max_txt_len=6)
    model.prompt_list = ["###Human: <Img><ImageHere></Img> Describe this. ###Assistant: "]
    images, captions = torch.randn(3, 3, 28, 28), ["a dog", "two cats on a red sofa", "x"]
    expected = model({"image": images, "text_input": captions})
    for parts in ((None,), (None, "Describe this."), (None, "\nDescribe this. ")):
        conversations = Conversations((("user", parts), ("assistant", (caption,))) for caption in captions)
        output = model({"image": images, "text_input": conversations})
        assert output["loss"].item() == expected["loss"].item() and output["num_labels"] == expected["num_labels"]


@pytest.fixture
def uneven():
    """Conversations with 2, 0, 1, 3, 0 and 0 images."""
    return Conversations(
        [
            (("user", (None, "What is it?")), ("assistant", ("a dog",)), ("user", (None,)), ("assistant", ("a cat",))),
            (("user", ("Hello",)), ("assistant", ("Hello! What can I do?",))),
            (("system", ("Be brief.",)), ("user", ("See", None)), ("assistant", ("Yes.",))),
            (("user", (None, None, "Which is red?", None)), ("assistant", ("The second one, I think.",))),
            # Their beginnings, an answer included, are equal.
            (("user", ("Hi",)), ("assistant", ("Yes?",)), ("user", ("A dog?",)), ("assistant", ("No.",))),
            (("user", ("Hi",)), ("assistant", ("Yes?",)), ("user", ("A cat?",)), ("assistant", ("Yes, a cat.",))),
        ]
    )


@pytest.mark.parametrize("learn_on", ["answers", "all"])
def test_packed_padded_and_one_by_one_are_equal(build_golden_model, uneven, learn_on):
    model = build_golden_model(template="vicuna_v0", max_txt_len=200, learn_on=learn_on)
    images = torch.randn(6, 3, 28, 28)

    def loss_and_gradient(samples):
        model.zero_grad()
        output = model(samples)
        output["loss"].backward()
        return output["loss"].item(), model.llama_proj.weight.grad.clone(), output["num_labels"]

    samples = {"image": images, "text_input": uneven}
    loss, gradient, labels = loss_and_gradient(samples)
    model.accelerate(packed=True, compiled=False)
    for max_tokens in (4096, 60):  # as one micro-batch, and as several
        model.step.max_tokens = max_tokens
        other, own, count = loss_and_gradient(samples)
        assert other == pytest.approx(loss, rel=1e-5) and count == labels
        assert (own - gradient).norm() < 1e-5 * gradient.norm()
    total, first = 0.0, 0
    for conversation, count in zip(uneven, (2, 0, 1, 3, 0, 0), strict=True):
        alone = {"image": images[first : first + count], "text_input": Conversations([conversation])}
        part, own, count_of_labels = loss_and_gradient(alone)
        total, first = total + part * count_of_labels, first + count
        assert count or not own.any()
    assert total / labels == pytest.approx(loss, rel=1e-5)


def test_images_that_were_cut_off_are_not_seen(build_golden_model, uneven):
    model = build_golden_model(template="vicuna_v0", max_txt_len=6)
    images = torch.randn(6, 3, 28, 28)
    prepared = model.prepare({"image": images, "text_input": uneven, "image_id": [*"abcdef"]})
    assert torch.equal(prepared["image"], images[[0, 2, 3, 4, 5]])
    others = images.clone()
    others[1] = 0
    assert model(prepared)["loss"] == model({"image": others, "text_input": uneven})["loss"]


def test_markers_in_texts_are_broken_up_and_counted(build_golden_model):
    model = build_golden_model(template="vicuna_v0")
    messages = (("user", (None, "a ### b")), ("assistant", ("c </s> <ImageHere>",)))
    samples = model.sanitize({"image": torch.zeros(1, 3, 28, 28), "text_input": Conversations([messages])})
    assert [*samples["text_input"]] == [(("user", (None, "a # ## b")), ("assistant", ("c < /s> < ImageHere>",)))]
    assert len(samples["broken_up"]) == 1
    headings = Conversations([(("user", ("### A",)), ("assistant", ("### B",)))])  # no markers of other templates
    assert build_golden_model(template="vicuna_v1").sanitize({"text_input": headings})["text_input"] == headings
    sound = Conversations([(("user", ("a",)), ("assistant", ("b",)))])
    assert "broken_up" not in model.sanitize({"text_input": sound})


def test_a_packed_batch_of_texts_alone():
    """No image vector, in a micro-batch of its own."""
    packed = pack([[1, 5, 6, 7]], [[-100, -100, 6, 7]], max_tokens=100)
    assert packed.num_image_vectors == 0 and packed.num_labels == 2
