"""Conversations on a GPU: packed, compiled and in CUDA graphs, in 16 and 4 bit, against the plain step."""

import pytest
import torch
from helpers import loss_and_gradient

from minigpt4.datasets.conversations.batch import Conversations

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def several(names: list[str]) -> Conversations:
    """Conversations with 2, 0, 1 and 1 images."""
    return Conversations(
        [
            (
                ("user", (None, "Which?")),
                ("assistant", (names[0],)),
                ("user", ("And", None)),
                ("assistant", (names[1],)),
            ),
            (("user", ("Hello",)), ("assistant", ("Hello there",))),
            (("system", ("Be brief.",)), ("user", (None, "Which?")), ("assistant", (names[2],))),
            (("user", (None,)), ("assistant", (names[3],))),
        ]
    )


def without_images() -> Conversations:
    return Conversations((("user", (f"Say {n}",)), ("assistant", (f"{n} it is",))) for n in range(4))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("pictures", [True, False])
def test_fast_equals_plain(load_tiny, drawings, pictures, compiled):
    plain, fast = load_tiny("cuda"), load_tiny("cuda")
    fast.accelerate(packed=True, compiled=compiled)
    image = drawings["image"].cuda()
    samples = {"image": image, "text_input": several(drawings["text_input"])}
    if not pictures:
        samples = {"image": image[:0], "text_input": without_images()}
    expected, gradient = loss_and_gradient(plain, samples)
    for _ in range(3):  # eager, captured, replayed
        output, own = loss_and_gradient(fast, samples)
        assert output["loss"].item() == pytest.approx(expected["loss"].item(), rel=0.02)
        assert output["num_labels"] == expected["num_labels"]
        if pictures:
            assert torch.cosine_similarity(own.flatten(), gradient.flatten(), dim=0) > 0.98
        else:
            assert not own.any()
