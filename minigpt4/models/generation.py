"""Where an answer ends: on its text, whatever the tokenizer makes of it."""

import torch


class StopOnText:
    """Stopping criterion for transformers' `generate`: a row is done once `stop` stands in its new text.

    The first release compared token ids of one tokenizer, on row 0 only.
    """

    def __init__(self, tokenizer, stop: str):
        self._tokenizer = tokenizer
        self._stop = stop
        # A token is at least one byte of text, or a special token that decodes to none.
        self._tail = len(stop.encode()) + 8

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        tails = input_ids[:, -self._tail :].tolist()
        done = [self._stop in self._tokenizer.decode(tail) for tail in tails]
        return torch.tensor(done, device=input_ids.device)


def clean_answer(text: str, stop: str) -> str:
    """The text before `stop`, stripped."""
    return text.split(stop)[0].strip()
