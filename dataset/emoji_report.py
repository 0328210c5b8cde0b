"""Ask a model the questions about held-out drawings that emoji_questions.py made, and count exact answers.

    python dataset/emoji_report.py --cfg-path train_configs/minigpt4_tiny_stage3_conversations.yaml \
        --options model.ckpt=output/minigpt4_tiny_stage3_conversations/<job id>

Each question is asked in the model's own template, after the right answers to those before it. Decoding is greedy.
`chance` is the share of the most frequent answer.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from emoji_questions import ROOT, topic_of

from minigpt4.cli.arguments import add_config_arguments
from minigpt4.common.config import Config
from minigpt4.common.failing import format_error, is_mistake
from minigpt4.conversation import Chat, open_picture
from minigpt4.conversation.conversation import IMAGE_TURN
from minigpt4.conversation.loading import load_chat
from minigpt4.conversation.pictures import PictureError
from minigpt4.fast.decoding.loop import cached_decoding

BATCH_SIZE = 64
PLACE = "<image>"


class Asked(NamedTuple):
    """A question of a conversation: its topic, the prompt, the pictures so far, and the right answer."""

    topic: str
    prompt: str
    pictures: list[Path]
    answer: str


def questions(chat: Chat, record: dict, folder: Path) -> Iterator[Asked]:
    """The questions of a record, whose paths of pictures are relative to `folder`."""
    conv, pictures, messages = chat.new_conversation(), 0, record["messages"]
    for question, answer in zip(messages[::2], messages[1::2], strict=True):
        text = question["content"]
        if PLACE in text:
            pictures += 1
            conv.add_to_question(IMAGE_TURN)
        conv.add_to_question(text.replace(PLACE, "").strip())
        conv.append_message(conv.roles[1], None)
        seen = [folder / name for name in record["images"][:pictures]]
        yield Asked(topic_of(text), conv.get_prompt(), seen, answer["content"])
        conv.messages[-1][1] = answer["content"]


def measure(chat: Chat, asked: list[Asked]) -> dict[str, list[tuple[str, str]]]:
    """(the model's answer, the right one) of each question, by topic."""
    found = defaultdict(list)
    asked = sorted(asked, key=lambda each: len(each.prompt))  # little padding
    for first in range(0, len(asked), BATCH_SIZE):
        batch = asked[first : first + BATCH_SIZE]
        images = torch.stack([chat.vis_processor(open_picture(path)) for each in batch for path in each.pictures])
        stop = chat.new_conversation().stop
        options = {"decoding_loop": cached_decoding, "max_new_tokens": 24}
        answers = chat.model.generate(images.to(chat.device), [each.prompt for each in batch], stop, **options)
        for each, answer in zip(batch, answers, strict=True):
            found[each.topic].append((answer, each.answer))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser, "YAML file of the model")
    data = ROOT / "data" / "emoji_questions" / "heldout.jsonl"
    parser.add_argument("--data", type=Path, default=data, help="conversations (data/emoji_questions/heldout.jsonl)")
    args = parser.parse_args()
    cfg = Config(args)
    cfg.check_paths()
    chat = load_chat(cfg, torch.device("cpu"))
    records = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    found = measure(chat, [each for record in records for each in questions(chat, record, args.data.parent)])
    found["all"] = [pair for pairs in found.values() for pair in pairs]
    print(f"{'question':10} {'n':>5} {'exact':>8} {'chance':>8}")
    for topic, pairs in found.items():
        exact = sum(answer == right for answer, right in pairs)
        chance = Counter(right for _, right in pairs).most_common(1)[0][1]
        print(f"{topic:10} {len(pairs):5} {exact / len(pairs):8.1%} {chance / len(pairs):8.1%}")


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        if not is_mistake(error) and not isinstance(error, PictureError):
            raise
        sys.exit(format_error(error))
