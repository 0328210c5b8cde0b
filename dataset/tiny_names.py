"""The evaluation task of the tiny default: whether answers name the things, and how they are written.

    PYTHONPATH=dataset python -m minigpt4 evaluate --import tiny_names --task tiny_names \\
        --cfg-path train_configs/minigpt4_tiny_stage1_pretrain.yaml --options model.ckpt=RUN \\
        --data data/tiny/heldout/filter_cap.json --out results
"""

import json
import random
from pathlib import Path

import numpy as np
from tiny_text import exact, full_sentence, load_concepts, named

from minigpt4.common.registry import registry
from minigpt4.evaluation import Figure, mean

HEAD_PREDICTIONS = Path(__file__).resolve().parent / "tiny" / "head_predictions.json"


@registry.register("eval_task", "tiny_names")
class TinyNames:
    """The reference of a picture is the name of its concept."""

    def measure(self, examples, answers):
        """The figures; "head" is the one that pretrained the encoder (dataset/tiny/recipe)."""
        texts, names = [answer.text for answer in answers], [example.references[0] for example in examples]
        right, known = np.array(list(map(exact, texts, names))), np.array(known_to_head(names))
        shuffled = random.Random(0).sample(names, len(names))
        sentences = [full_sentence(answer.text) and answer.ended for answer in answers]
        return {
            "named": mean(list(map(named, texts, names))),
            "exact name": mean(right),
            "exact name, of those that the head knows": Figure(np.stack([right & known, known], axis=1).astype(float)),
            "known to the head": mean(known),
            "exact name, names shuffled": mean(list(map(exact, texts, shuffled))),
            "full sentences that end by themselves": mean(sentences),
        }


def known_to_head(names: list[str]) -> list[bool]:
    """For the held-out picture of each concept, whether the encoder's head names it right."""
    predicted = json.loads(HEAD_PREDICTIONS.read_text(encoding="utf-8"))
    ids = {concept.name: concept.id for concept in load_concepts()}
    return [predicted[ids[name]] == ids[name] for name in names]
