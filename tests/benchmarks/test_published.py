"""The tables of published names and shapes, against the golden list and the published sizes of the files."""

import json
from math import prod

import pytest
from helpers import GOLDEN

from minigpt4.benchmarks import published

FULL = published.SIZES["7b"]


def test_the_tables_are_the_golden_list_and_the_surplus():
    golden = json.loads((GOLDEN / "full_size_keys.json").read_text())["state_dict"]
    golden = {row["key"]: tuple(row["shape"]) for row in golden}
    vision = {f"visual_encoder.{name}": shape for name, shape in published.eva_vit(FULL).items()}
    tables = vision | published.blip2(FULL, text_branch=True) | published.projection(FULL)
    assert {name: tables[name] for name in golden} == golden
    surplus = tables.keys() - golden.keys()
    known = ("visual_encoder.blocks.39.", "visual_encoder.norm.", "visual_encoder.head.", "t5_proj.", "Qformer.cls.")
    text = ("word_embeddings.", "position_embeddings.", ".intermediate.", ".output.")
    assert all(name.startswith(known) or any(part in name for part in text) for name in surplus)
    assert len(surplus) == 13 + 4 + 2 + 7 + 2 + 12 * 6


@pytest.mark.parametrize(
    ("table", "itemsize", "kibibytes"), [(published.eva_vit(FULL), 2, 1977783), (published.blip2(FULL), 4, 423322)]
)
def test_the_sizes_are_those_of_the_published_files(table, itemsize, kibibytes):
    """Which leaves no room for a text branch in the Q-Former's, and fixes the width of the encoder's head."""
    size = sum(map(prod, table.values())) * itemsize / 1024
    assert kibibytes - 256 < size < kibibytes


@pytest.mark.parametrize(("size", "parameters"), [("7b", 6_738_415_616), ("13b", 13_015_864_320)])
def test_vicunas_are_llamas(size, parameters):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    table = published.llama(published.SIZES[size])
    assert sum(map(prod, table.values())) == parameters
    with torch.device("meta"):
        llama = LlamaForCausalLM(LlamaConfig(**published.llama_config(published.SIZES[size], "v1.1")))
    assert {name: tuple(p.shape) for name, p in llama.named_parameters()} == table
