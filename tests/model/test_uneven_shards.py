"""Shards of blocks whose heads and inner values divide unevenly: the numbers of one device all the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from node.model.blocks.span import load_span
from node.model.checkpoint.folder import HashMemo, ModelFolder, open_folder
from node.model.parallel.sharded import load_sharded
from node.model.parallel.team import Team, open_team
from tests.model.test_sharded_span import assert_close
from tests.model_fixtures import BLOCKS, TINY

torch.set_num_threads(1)

# By the number of ranks: heads, key heads and inner values of models.
CASES = {
    3: [(9, 3, 50)],  # as many heads as SmolLM2 has; no two ranks have as many inner values
    4: [(4, 2, 48), (4, 1, 49)],  # each key head is at two ranks, and at four
}


@pytest.fixture(scope="module", params=CASES)
def team(request) -> Iterator[Team]:
    team = open_team(["cpu"] * request.param)
    yield team
    team.close()


def saved_with(family: str, path: Path, **values: Any) -> ModelFolder:
    """A model of a family with other values in its config, and no parameter that is 0 or 1 throughout."""
    name, usual = TINY[family]
    kind = getattr(transformers, name)
    torch.manual_seed(3)
    model = kind(kind.config_class(**{**usual, **values}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(path / "model")
    return open_folder(path / "model", memo=HashMemo(path / "hashes.json"))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_heads_biases_and_inner_values_of_any_number_are_divided(team, family, tmp_path):
    """llama with biases at every linear, qwen3 with norms of queries and keys, gemma3 with windows too."""
    for case, (heads, key_heads, inner) in enumerate(CASES[team.group.ranks]):
        folder = saved_with(
            family, tmp_path / str(case), num_attention_heads=heads, num_key_value_heads=key_heads,
            intermediate_size=inner, hidden_size=36, head_dim=8, attention_bias=family != "gemma3_text",
            mlp_bias=True,
        )  # fmt: skip
        sharded, one = load_sharded(team, folder, 0, BLOCKS), load_span(folder, 0, BLOCKS)
        biases = {name: each for name, each in one.model.named_parameters() if name.endswith("bias")}
        assert len(biases) == {"llama": 7, "qwen3": 4, "gemma3_text": 0}[family] * BLOCKS
        assert all(each.abs().max() > 0 for each in biases.values())  # a lost one would show
        assert_close(sharded, one, 1e-5)
