"""python -m minigpt4 compare: what two runs have in common, and where they part.

    python -m minigpt4 compare output/stage1/20261130143043 output/stage1/20261130160212

It lists the settings and the parts of the environment that differ, the first step at which the loss, the samples or
another number differ, and the checkpoints whose weights differ. The exit status is 0 if all numbers and weights are
equal, and otherwise 1. Settings, environment, times and memory have no part in that.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from minigpt4.common.commands import command_parser, path_argument
from minigpt4.common.text import pluralize

# Lines of a list. There may be hundreds of packages.
LONGEST = 20


def main(argv: list[str]) -> int:
    """Compare. Raises ConfigError for a folder that is no run's."""
    parser = command_parser("compare", __doc__)
    parser.add_argument("runs", nargs=2, type=path_argument, metavar="RUN", help="folder of a run")
    folders: tuple[Path, Path] = tuple(parser.parse_args(argv).runs)
    from minigpt4.tracking import compare

    _print_differences("Settings", compare.settings(folders))
    _print_differences("Environment", compare.environments(folders))
    equal = _print_numbers(compare.numbers(folders))
    for line, are_equal in _checkpoints(folders):
        print(line)
        equal = equal and are_equal
    print("The runs are equal." if equal else "The runs differ.")
    return 0 if equal else 1


def _print_differences(title: str, differences: list) -> None:
    print(f"{title}: {pluralize(len(differences), 'difference') if differences else 'equal'}")
    for each in differences[:LONGEST]:
        print(f"  {each}")
    if len(differences) > LONGEST:
        print(f"  … and {len(differences) - LONGEST} more")


def _print_numbers(found) -> bool:
    """Print how the numbers compare. Returns whether they are equal."""
    print(f"Numbers: {pluralize(found.steps, 'step')} in both, the last one {found.last}")
    for step, differences in found.first_differences.items():
        print(f"  step {step}, first difference of")
        for each in differences:
            print(f"    {each}")
    differing = {each.name for differences in found.first_differences.values() for each in differences}
    if same := [name for name in found.names if name not in differing]:
        print(f"  equal: {', '.join(same)}")
    for which, count in zip(("first", "second"), found.only, strict=True):
        if count:
            print(f"  {pluralize(count, 'step')} in the {which} run only")
    return bool(found.steps) and not found.first_differences and not any(found.only)


def _checkpoints(folders: tuple[Path, Path]) -> Iterator[tuple[str, bool]]:
    """A line for each checkpoint of both runs, and whether its weights are equal."""
    names = [sorted(path.name for path in folder.glob("*.pth")) for folder in folders]
    common = [name for name in names[0] if name in names[1]]
    if not common:
        yield "Checkpoints: none of the same name in both", True
    for name in common:
        first, second = (weights_digest(folder / name) for folder in folders)
        same = first == second
        yield f"{name}: {'equal' if same else 'different'} weights, sha256 {first[:16]} | {second[:16]}", same


def weights_digest(path: Path) -> str:
    """The sha256 of the names and values of the weights in a checkpoint."""
    import torch

    from minigpt4.weights import checkpoint

    weights, digest = checkpoint.weights_of(checkpoint.read_file(path), str(path)), hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
