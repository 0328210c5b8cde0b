"""Tensors seen without torch are those that torch sees."""

import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT
from safetensors.torch import save_file

from minigpt4.doctor.headers import HeaderError, numel, read_header, tensors_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_shapes_and_rows(tmp_path, suffix, dtype):
    torch.manual_seed(0)
    tensors = {"a": torch.randn(3, 4, dtype=dtype), "b.weight": torch.randn(50, 16, dtype=dtype), "c": torch.zeros(())}
    path = tmp_path / f"x{suffix}"
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    seen = read_header(path)
    assert {name: tensor.shape for name, tensor in seen.items()} == {"a": (3, 4), "b.weight": (50, 16), "c": ()}
    assert numel(seen) == 3 * 4 + 50 * 16 + 1
    expected = tensors["b.weight"][[0, 7, 49]].float().numpy()
    np.testing.assert_array_equal(seen["b.weight"].rows([0, 7, 49]), expected)


def test_views_share_a_storage(tmp_path):
    whole = torch.arange(80.0).view(20, 4)
    torch.save({"model": {"whole": whole, "part": whole[5:]}}, tmp_path / "x.pth")
    part = tensors_of(read_header(tmp_path / "x.pth"))["part"]
    np.testing.assert_array_equal(part.rows([0, 2]), whole[[5, 7]].numpy())


def test_what_a_checkpoint_holds_beside_tensors(tmp_path):
    layer = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    content = {"model": layer.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "dtype": torch.float16}
    content |= {"config": {"model": {"end_sym": "###"}}, "parameter": torch.nn.Parameter(torch.ones(2)), "odd": {1, 2}}
    torch.save(content, tmp_path / "x.pth")
    seen = read_header(tmp_path / "x.pth")
    assert (seen["epoch"], seen["config"], seen["parameter"].shape) == (3, content["config"], (2,))
    assert {name: t.shape for name, t in tensors_of(seen).items()} == {"weight": (3, 2), "bias": (3,)}


def test_nothing_that_a_file_names_is_called(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, ("raise SystemExit",))

    torch.save({"model": {"w": torch.ones(2)}, "evil": Evil()}, tmp_path / "evil.pth")
    assert tensors_of(read_header(tmp_path / "evil.pth"))["w"].shape == (2,)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"short", b"version https://git-lfs", b"\xff" * 100, pickle.dumps({"a": 1})])
def test_files_that_are_none(tmp_path, suffix, content):
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(HeaderError):
        read_header(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_cut_files(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    tensors = {"a": torch.ones(1000)}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(HeaderError, match="cut off: " if suffix == ".safetensors" else "zip"):
        read_header(path)


def test_the_old_format_needs_torch(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(HeaderError, match="only torch can read") as error:
        read_header(tmp_path / "x.pth")
    assert error.value.needs_torch


def test_a_list_is_no_weights(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "x.pth")
    with pytest.raises(HeaderError, match="holds a list"):
        read_header(tmp_path / "x.pth")


def test_reading_needs_no_torch(tmp_path):
    torch.save({"a": torch.ones(2, 3)}, tmp_path / "x.pth")
    code = (
        "import sys\nfrom pathlib import Path\nfrom minigpt4.doctor.headers import read_header\n"
        f"print(read_header(Path({str(tmp_path / 'x.pth')!r}))['a'].rows([1])[0].tolist(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[1.0, 1.0, 1.0] False\n", done.stderr
