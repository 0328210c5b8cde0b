"""The long run of soak.py, in short. Memory is judged in the long one only: at first it grows by itself."""

import gc

import pytest
from soak import is_level, measure


@pytest.mark.slow
def test_open_files_stay_level(tmp_path):
    gc.collect()  # what earlier tests of this process have left open would be closed meanwhile
    found = measure(tmp_path, steps=200, workers=2)
    files = [files for _, _, files in found[2:]]
    assert len(found) >= 18 and max(files) == files[0]


@pytest.mark.parametrize(("memory", "files", "level"), [(100.9, 50, True), (102.0, 50, False), (100.0, 51, False)])
def test_what_level_means(memory, files, level):
    assert is_level([(1, 50.0, 40), (2, 100.0, 50), (3, memory, files)]) is level
