"""Shards of blocks: every head and inner value is at one rank, key heads at as many as need them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from node.config import ConfigError
from node.model.checkpoint.architecture import ARCHITECTURES
from node.model.parallel.shard import FAMILIES, Shard, bounds, possible_ranks
from node.model.parallel.shares import places_of, shares


def config(heads: int, key_heads: int, inner: int = 48, **more: Any) -> Any:
    return SimpleNamespace(
        model_type="llama", num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=8,
        hidden_size=8 * heads, intermediate_size=inner, **more,
    )  # fmt: skip


@pytest.mark.parametrize(("total", "ranks"), [(1536, 3), (48, 2), (11008, 7), (5, 3), (100, 8), (64, 64)])
def test_every_value_is_at_one_rank_and_none_is_without(total, ranks):
    found = [bounds(total, ranks, rank) for rank in range(ranks)]
    assert [value for first, last in found for value in range(first, last)] == list(range(total))
    assert all(first < last for first, last in found)


def test_values_stay_together_in_whole_tiles_where_there_are_enough():
    assert bounds(11008, 4, 1) == (2752, 5504)
    assert all(each % 64 == 0 for rank in range(3) for each in bounds(1536, 3, rank))


def test_of_nine_heads_and_three_key_heads_three_or_nine_ranks_are_possible():
    assert possible_ranks(9, 3, 1536) == [3, 9]
    assert possible_ranks(32, 8, 11008) == [2, 4, 8, 16, 32]
    assert possible_ranks(4, 1, 48) == [2, 4]


def test_another_number_is_refused_with_those_that_are_possible():
    with pytest.raises(
        ConfigError, match=r"9 heads and 3 key heads .* among 2 ranks: the number of ranks can be 3, 9"
    ):
        Shard.of(config(9, 3), 2, 0)


def test_a_family_whose_linears_have_other_names_is_refused():
    other = config(8, 8)
    other.model_type = "bloom"
    with pytest.raises(ConfigError, match="the blocks of bloom cannot be divided"):
        Shard.of(other, 2, 0)


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_every_served_family_is_divided_or_refused_by_its_name(family):
    model = config(8, 8)
    model.model_type = family
    if family in FAMILIES:
        assert Shard.of(model, 2, 1).own_heads == (4, 8)
    else:
        with pytest.raises(ConfigError, match=f"the blocks of {family} cannot be divided among 2 ranks"):
            Shard.of(model, 2, 0)


@pytest.mark.parametrize(
    ("heads", "key_heads", "ranks"), [(8, 4, 2), (8, 4, 4), (8, 2, 4), (8, 1, 8), (9, 3, 3)]
)
def test_a_rank_has_the_key_heads_of_its_queries(heads, key_heads, ranks):
    queries = []
    for rank in range(ranks):
        shard = Shard.of(config(heads, key_heads), ranks, rank)
        first, last = shard.own_heads
        queries += range(first, last)
        wanted = {query * key_heads // heads for query in range(first, last)}
        assert wanted == set(range(*shard.own_key_heads))
    assert queries == list(range(heads))


def test_the_parts_of_a_product_add_up_and_a_bias_is_added_once():
    whole = {
        "mlp.gate_proj.weight": torch.randn(48, 16), "mlp.down_proj.weight": torch.randn(16, 48),
        "mlp.down_proj.bias": torch.randn(16), "mlp.down_proj.weight_scale": torch.randn(16),
        "mlp.gate_proj.bias": torch.randn(48), "input_layernorm.weight": torch.randn(16),
    }  # fmt: skip
    x = torch.randn(3, 16)
    answer = (x @ whole["mlp.gate_proj.weight"].T + whole["mlp.gate_proj.bias"]) @ whole[
        "mlp.down_proj.weight"
    ].T + whole["mlp.down_proj.bias"]
    found = torch.zeros(3, 16)
    for rank in range(3):
        own = Shard.of(config(3, 3), 3, rank).of_tensors(whole)
        inner = x @ own["mlp.gate_proj.weight"].T + own["mlp.gate_proj.bias"]
        found += inner @ own["mlp.down_proj.weight"].T + own["mlp.down_proj.bias"]
        assert torch.equal(own["mlp.down_proj.weight_scale"], whole["mlp.down_proj.weight_scale"])
        assert torch.equal(own["input_layernorm.weight"], whole["input_layernorm.weight"])
    assert torch.allclose(found, answer, atol=1e-4)


def test_the_trimmed_config_is_a_copy():
    whole = config(8, 2, 96)
    own = Shard.of(whole, 4, 3).trimmed(whole)
    assert (own.num_attention_heads, own.num_key_value_heads, own.head_dim) == (2, 1, 8)
    assert whole.num_attention_heads == 8


@pytest.mark.parametrize(
    ("free", "blocks", "expected"),
    [
        ([80, 80], 32, [16, 16]),
        ([24, 80], 13, [3, 10]),
        ([1, 1, 1], 4, [2, 1, 1]),
        ([5], 3, [3]),
        ([0, 0], 3, [3, 0]),
    ],
)
def test_blocks_are_divided_in_proportion_to_free_memory(free, blocks, expected):
    assert shares(free, blocks) == expected
    assert len(places_of(expected)) == blocks
