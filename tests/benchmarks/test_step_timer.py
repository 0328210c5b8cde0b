"""A step of the runner, taken apart by `bench train`."""

from helpers import Pictures

from minigpt4.benchmarks.step_timer import StepTimer


def test_taking_a_step_apart_leaves_all_as_it_was(build_golden_model, make_runner, pool):
    runner = make_runner(build_golden_model(), {"train": Pictures(*pool)})
    before = set(vars(runner)), set(vars(runner.task)), set(vars(runner.module))
    weights = runner.module.llama_proj.weight.detach().clone()
    timer = StepTimer(runner, iter([{"image": pool[0][:2], "text_input": pool[1][:2]}] * 2))
    timer.profiled_step()
    assert not weights.equal(runner.module.llama_proj.weight)
    assert before == (set(vars(runner)), set(vars(runner.task)), set(vars(runner.module)))
    assert {name: len(values) for name, values in timer.phases.items() if values} == {
        "vision": 1, "language": 1, "backward": 1, "optimizer": 1,
    }  # fmt: skip
