"""Chat compared with the first release (tests/golden/README.md, "conversation"), except as in REFERENCE.md §9."""

import json

import numpy as np
import pytest
import torch
from helpers import GOLDEN

from minigpt4.conversation import CONV_VISION, Conversation, conversation
from minigpt4.models.generation import answer_text, strip_leading

DATA = json.loads((GOLDEN / "conversation.json").read_text(encoding="utf-8"))
PROMPTS = {case["name"]: case for case in DATA["prompts"]}
GENERATION = {case["name"]: case for case in DATA["generation"]}
POSTPROCESS = {case["name"]: case for case in DATA["postprocess"]}

DIFFERENT_PROMPTS = ["two_images", "empty_answer", "question_ends_like_image"]
SAME_PROMPTS = [name for name in PROMPTS if name not in DIFFERENT_PROMPTS]
IDENTICAL = [name for name, case in GENERATION.items() if case["agreement"] == "identical"]
BEAM_ENDED_EARLIER = ["eos_two_turn_0.beam3", "stop_one_token_two_turn_1.beam3"]
CUT_CONTEXT = ["left_truncated_context.greedy"]
WITH_EOS = [
    "eos_one_turn_0.greedy",
    "eos_one_turn_1.greedy",
    "eos_short_two_turn_0.greedy",
    "eos_two_turn_0.greedy",
    "eos_two_turn_1.greedy",
    "eos_two_turn_2.greedy",
    "eos_last",  # of the postprocessing
]


class StopOnIds:
    """The first release's stopping criterion: certain ids at the end of row 0 end all rows."""

    def __init__(self, stop_ids):
        self.stop_ids = stop_ids

    def __call__(self, input_ids, scores, **kwargs):
        row = input_ids[0].tolist()
        stop = any(row[-len(ids) :] == ids for ids in self.stop_ids)
        return torch.full((len(input_ids),), stop)


def stopped_by_id(name):
    """True if the first release's ids contain its stop or ours, so that the two can end at different places."""
    case = GENERATION[name]
    row = case["new_token_ids"]
    return any(row[-len(ids) :] == ids for ids in case["stop_ids"]) or "###" in case["decoded_all_new_tokens"]


def test_the_template(play):
    assert CONV_VISION.get_prompt() == DATA["system_and_roles"]["prompt_of_empty_conversation"]
    assert list(CONV_VISION.roles) == DATA["system_and_roles"]["roles"]
    assert CONV_VISION.sep == DATA["system_and_roles"]["sep"]


@pytest.mark.parametrize("name", SAME_PROMPTS)
def test_prompts(play, name):
    conv, _ = play(PROMPTS[name]["steps"])
    assert conv.messages == PROMPTS[name]["messages"]
    assert conv.get_prompt() == PROMPTS[name]["prompt"]


def test_two_separators():
    case = DATA["two_separator_style"]
    keys = ("system", "roles", "sep", "sep2", "messages")
    assert Conversation(**{key: case[key] for key in keys}).get_prompt() == case["prompt"]


@pytest.mark.parametrize("name", [name for name in SAME_PROMPTS if "context_length" in PROMPTS[name]])
def test_contexts(golden, chat, play, name):
    _, tensors = golden("conversation")
    case = PROMPTS[name]
    conv, img_list = play(case["steps"])
    embeds = chat.get_context_emb(conv, img_list)
    assert embeds.shape == (1, case["context_length"], 40)
    if f"context.{name}" in tensors:
        torch.testing.assert_close(embeds, tensors[f"context.{name}"], atol=2e-4, rtol=0)
    table = chat.model.llama_model.get_input_embeddings()
    expected = []
    for i, segment in enumerate(case["segment_ids"]):
        expected += [img_list[i - 1][0]] if i else []
        expected.append(table(torch.tensor(segment, dtype=torch.long)))
    torch.testing.assert_close(embeds[0], torch.cat(expected), atol=1e-6, rtol=0)


def test_images(golden, chat, play):
    _, tensors = golden("conversation")
    _, img_list = play([["upload", 0], ["upload", 1], ["upload", 2]])
    for i, embeds in enumerate(img_list):
        torch.testing.assert_close(embeds, tensors[f"image_embeds.{i}"], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", [name for name in IDENTICAL if name not in CUT_CONTEXT])
def test_token_ids(golden, chat, play, name):
    """Contexts and decoding options, with the first release's stopping criterion instead of ours."""
    _, tensors = golden("conversation")
    case = GENERATION[name]
    conv, img_list = play(case["steps"])
    conv.append_message(conv.roles[1], None)
    embeds = chat.get_context_emb(conv, img_list)
    assert embeds.shape[1] == case["context_length_used"]
    if f"generate.{name}.inputs_embeds" in tensors:
        torch.testing.assert_close(embeds, tensors[f"generate.{name}.inputs_embeds"], atol=2e-4, rtol=0)
    options = {key: value for key, value in case["arguments"].items() if key != "max_length"}
    ids = chat.model.llama_model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
        pad_token_id=2,
        do_sample=False,
        stopping_criteria=[StopOnIds(case["stop_ids"])],
        **options,
    )
    assert ids[0].tolist() == case["new_token_ids"]


OTHERWISE_ENDED = CUT_CONTEXT + WITH_EOS + BEAM_ENDED_EARLIER


@pytest.mark.parametrize("name", [n for n in IDENTICAL if n not in OTHERWISE_ENDED and not stopped_by_id(n)])
def test_answers(chat, play, name):
    """All of `Chat.answer`, for the answers that neither the first release's stop nor eos ended."""
    case = GENERATION[name]
    conv, img_list = play(case["steps"])
    text, ids = chat.answer(conv, img_list, do_sample=False, **case["arguments"])
    assert ids.dtype == np.int64
    assert ids.tolist() == strip_leading(chat.model.tokenizer, case["new_token_ids"])
    assert text == case["text"]
    assert conv.messages[-1] == case["last_message"]


@pytest.mark.parametrize("name", [name for name in POSTPROCESS if name not in WITH_EOS])
def test_postprocessing(chat, play, monkeypatch, name):
    case = POSTPROCESS[name]
    ids = torch.tensor([case["generated_ids"]])
    monkeypatch.setattr(conversation, "continue_embeds", lambda *args, **options: ids)
    conv, img_list = play([["upload", 0], ["ask", "What is it?"]])
    text, ids = chat.answer(conv, img_list)
    assert text == case["text"]
    assert ids.tolist() == case["returned_token_ids"]
    assert conv.messages[-1] == ["Assistant", text]


def test_differs_on_purpose(chat, play):
    """The golden cases that show faults of the first release (REFERENCE.md §9, by number), and our results."""
    system = CONV_VISION.get_prompt()
    ours = {
        # 12: two pictures in a row are one turn
        "two_images": "Human: <Img><ImageHere></Img> <Img><ImageHere></Img> Compare them.###Assistant:",
        # 15: an empty answer keeps its separator
        "empty_answer": "Human: <Img><ImageHere></Img> What is it?###Assistant: ###Human: Hm?###Assistant:",
        # 15: a question that ends in </Img> is no picture
        "question_ends_like_image": "Human: <Img><ImageHere></Img> text </Img>###Human: more###",
    }
    assert list(ours) == DIFFERENT_PROMPTS
    for name, expected in ours.items():
        assert play(PROMPTS[name]["steps"])[0].get_prompt() == system + expected
        assert PROMPTS[name]["prompt"] != system + expected

    # 15: </s> is no part of an answer
    assert [name for name, case in (GENERATION | POSTPROCESS).items() if "</s>" in case["text"]] == WITH_EOS
    for name in WITH_EOS:
        case = (GENERATION | POSTPROCESS)[name]
        ids = case["returned_token_ids"]
        assert answer_text(chat.model.tokenizer, ids, "###", "Assistant:") == case["text"].replace("</s>", "")

    # 10: the context is not cut in front; the answer gets the room that is left
    case = GENERATION["left_truncated_context.greedy"]
    conv, img_list = play(case["steps"])
    text, ids = chat.answer(conv, img_list, do_sample=False, **case["arguments"])
    assert len(ids) == 157 - 146
    assert text != case["text"]


@pytest.mark.parametrize("name", [name for name in IDENTICAL if stopped_by_id(name) and "beam3" not in name])
def test_row_0_id_stops_differ_on_purpose(chat, play, name):
    """1: our answers end where the text contains "###", whichever ids spell it.

    The first release ended at the same place, or it continued past a separator, or it ended without one.
    """
    case = GENERATION[name]
    conv, img_list = play(case["steps"])
    settings = {key: value for key, value in case["arguments"].items() if key != "min_length"}
    text, ids = chat.answer(conv, img_list, do_sample=False, **settings)
    theirs = case["new_token_ids"]
    ids = theirs[: len(theirs) - len(strip_leading(chat.model.tokenizer, theirs))] + ids.tolist()
    assert "###" not in text
    shorter = min(len(ids), len(theirs))
    assert ids[:shorter] == theirs[:shorter]

    def has_separator(ids):
        return "###" in chat.model.tokenizer.decode(ids, skip_special_tokens=False)

    assert has_separator(ids) or len(ids) == 20 or ids[-1] == 2
    assert not has_separator(ids[:-1])
    if len(ids) < len(theirs):
        assert has_separator(theirs[:-1])
    if len(ids) > len(theirs):
        assert not has_separator(theirs)


@pytest.mark.parametrize("name", BEAM_ENDED_EARLIER)
def test_beams_differ_on_purpose(chat, play, name):
    """1: in the first release a beam other than row 0 continued after "###"; our beams end there."""
    case = GENERATION[name]
    conv, img_list = play(case["steps"])
    text, ids = chat.answer(conv, img_list, do_sample=False, **case["arguments"])
    assert "###" in chat.model.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    assert text != case["text"]
