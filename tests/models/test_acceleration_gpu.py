"""Accelerated training steps on a GPU give losses and gradients of plain ones. Skipped, and said so, without one."""

import pytest
import torch

from minigpt4.models import packing
from minigpt4.models.cuda_graphs import GraphedFunction

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TEXTS = (["a dog", "two cats on a mat, asleep"], ["one", "a"], ["a much longer text, with more words in it"] * 2)


def steps(model, order):
    """Losses and gradients of the projection, one after the other; batches differ in length."""
    model.prompt_list = ["###Human: <Img><ImageHere></Img> What is it? ###Assistant: "]
    model.max_txt_len = 200
    results = []
    for number in order:
        torch.manual_seed(number)
        images = torch.randn(2, 3, 28, 28, device="cuda")
        model.zero_grad()
        loss = model({"image": images, "text_input": [text * 9 for text in TEXTS[number]]})["loss"]
        loss.backward()
        results.append((loss.item(), model.llama_proj.weight.grad.clone()))
    return results


@pytest.mark.parametrize("recomputed", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_accelerated_equals_plain(build_golden_model, caplog, dtype, recomputed):
    caplog.set_level("INFO")
    order = (0, 1, 2, 0, 1, 2, 0, 0, 1)  # as it stands, recorded, replayed
    exact = steps(build_golden_model("cuda"), order)
    plain = steps(build_golden_model("cuda", dtype), order)
    model = build_golden_model("cuda", dtype, llm_grad_checkpoint=recomputed)
    model.accelerate(packed=True, compiled=True)
    assert model.packed
    assert ("predict" in vars(model)) == (not recomputed)  # fused_llama.py
    accelerated = steps(model, order)
    for (loss, gradient), usual, ours in zip(exact, plain, accelerated, strict=True):
        usual_error, error = ((other - gradient).norm() / gradient.norm() for _, other in (usual, ours))
        assert error < 1.5 * usual_error + 0.01  # no further from float32 than a plain step in 16 bit is
        assert ours[0] == pytest.approx(loss, rel=0.01)
    assert ("Recording a CUDA graph of the language model" in caplog.text) == (dtype == torch.bfloat16)
    assert accelerated[6][0] == accelerated[7][0]
    assert torch.equal(accelerated[6][1], accelerated[7][1])


def test_without_gradients_while_training(build_golden_model):
    """A validation pass between steps, with and without inference mode, leaves the next step as it was."""
    model = build_golden_model("cuda", torch.bfloat16)
    model.accelerate(packed=True, compiled=True)
    expected = steps(model, (0, 0, 0))[-1]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.manual_seed(0)
            model({"image": torch.randn(2, 3, 28, 28, device="cuda"), "text_input": ["a", "b"]})
        again = steps(model, (0,))[0]
        assert again[0] == expected[0]
        assert torch.equal(again[1], expected[1])


def test_recordings_share_memory_with_the_calls_before_them():
    """Each pass keeps 16 tensors of 64 MiB; the recording's own would be 1 GiB more."""

    def waves(x):
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = x
            for _ in range(16):
                y = y.sin()
            return torch.autograd.grad(y.sum(), x)

    torch.cuda.empty_cache()
    function, x = GraphedFunction(waves, "waves"), torch.randn(2**24, device="cuda")
    (expected,), peaks = waves(x), []
    for _ in range(4):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        assert torch.equal(function(x)[0], expected)
        peaks.append(torch.cuda.max_memory_reserved() / 2**20)
    assert len(function.recorded) == 1
    assert peaks[0] > 1000
    assert max(peaks) < peaks[0] + 500


def test_pieces_hold_one_at_a_time(build_golden_model, monkeypatch):
    """Losses and gradients of batches cut into pieces, recorded and replayed, are those of whole ones, to rounding."""
    order, results = (0, 1, 2, 0, 1, 2, 0, 1, 2), []
    for rows in (1024, 128):
        monkeypatch.setattr(packing, "PIECE", rows)
        model = build_golden_model("cuda", torch.bfloat16)
        model.accelerate(packed=True, compiled=True)
        results.append(steps(model, order))
    for (loss, gradient), (in_pieces, gradient_in_pieces) in zip(*results, strict=True):
        assert in_pieces == pytest.approx(loss, rel=2e-3)
        assert (gradient_in_pieces - gradient).norm() < 0.01 * gradient.norm()
