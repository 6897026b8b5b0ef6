"""The likeliest token, found with less work: always the same one, with the same bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from node.model.checkpoint.folder import HashMemo, open_folder
from node.model.embed_and_head import load_embed_and_head
from node.model.weights.argmax_head import ExactArgmax
from node.model.weights.kernels import slices_for
from node.model.weights.quantize import kernels
from tests.model_fixtures import save_tiny

compiled = kernels()
pytestmark = pytest.mark.skipif(compiled is None, reason="numba cannot be imported here")


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def whole(weight: Tensor, x: Tensor) -> Tensor:
    return compiled.Rows(weight, None, None)(x)


def assert_best(screen: ExactArgmax, weight: Tensor, x: Tensor) -> Tensor:
    found, expected = screen(x, 1), whole(weight, x)
    assert torch.equal(found.argmax(1), expected.argmax(1))
    assert [screen.best(row, 1) for row in x.numpy()] == expected.argmax(1).tolist()
    assert screen.bests(x.numpy(), 1) == expected.argmax(1).tolist()
    there = torch.isfinite(found)
    assert torch.equal(found[there], expected[there])
    return there.sum(1)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    outs=st.integers(1, 400),
    width=st.integers(1, 90),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 1e3]),
    outlier=st.sampled_from([1.0, 1e4]),
    seed=st.integers(0, 10_000),
)
def test_the_largest_is_the_same_one_with_the_same_bits(rows, outs, width, spread, outlier, seed):
    weight = 1 + spread * torch.randn(outs, width, generator=seeded(seed))
    x = torch.randn(rows, width, generator=seeded(seed + 1))
    x[:, 0] *= outlier
    assert_best(ExactArgmax(weight), weight, x)


def test_of_many_rows_only_a_few_are_computed_whole():
    weight = torch.randn(5000, 64, generator=seeded(1))
    left = assert_best(ExactArgmax(weight), weight, torch.randn(20, 64, generator=seeded(2)))
    assert left.float().mean() < 10


def test_of_equal_rows_the_first_one_is_found():
    weight = torch.randn(3000, 32, generator=seeded(3))
    x = torch.randn(1, 32, generator=seeded(4))
    best = int(whole(weight, x).argmax())
    weight[[best, 17, 2999]] = weight[best].clone()
    assert int(ExactArgmax(weight)(x, 1).argmax()) == min(best, 17)
    assert_best(ExactArgmax(weight), weight, x)


def test_where_all_are_alike_all_are_computed():
    weight = torch.randn(1, 32, generator=seeded(5)).expand(500, 32).contiguous()
    assert assert_best(ExactArgmax(weight), weight, torch.randn(1, 32, generator=seeded(6))).item() == 500


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hidden_state_that_holds_no_number_is_told_as_it_is(bad):
    weight = torch.randn(100, 16, generator=seeded(7))
    x = torch.randn(3, 16, generator=seeded(8))
    x[1, 5] = bad
    found, expected = ExactArgmax(weight)(x, 1), whole(weight, x)
    assert torch.equal(found[1].isnan(), expected[1].isnan())
    assert torch.equal(found[[0, 2]].argmax(1), expected[[0, 2]].argmax(1))
    assert ExactArgmax(weight).best(x[1].numpy(), 1) == int(expected[1].argmax())
    assert ExactArgmax(weight).bests(x.numpy(), 1) == [int(row.argmax()) for row in expected.numpy()]


def test_weights_that_are_no_numbers_are_refused():
    weight = torch.ones(10, 16)
    weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        ExactArgmax(weight)


@pytest.mark.parametrize("variant", ["llama", "gpt2"])
def test_ends_find_the_same_token_with_a_screen_and_give_all_logits_to_who_wants_them(variant, tmp_path):
    save_tiny(variant, tmp_path / "model", max_shard_size="10MB")
    ends = load_embed_and_head(open_folder(tmp_path / "model", memo=HashMemo(tmp_path / "hashes.json")))
    hidden = torch.randn(4, 3, ends.hidden_size, generator=seeded(9))
    ends.make_exact_argmax()  # nothing yet: the library computes this head
    assert ends._exact_argmax is None
    ends.compile_head()
    before = ends.head(hidden)
    ends.make_exact_argmax()
    assert (ends._exact_argmax is None) is (variant == "gpt2")
    assert torch.equal(ends.head(hidden), before)
    best = ends.head(hidden, best_only=True)
    assert best.shape == before.shape
    assert torch.equal(best.argmax(-1), before.argmax(-1))
    assert torch.equal(best.amax(-1), before.amax(-1))
    for row, place in zip(hidden.flatten(0, 1), before.argmax(-1).flatten(), strict=True):
        assert ends.best_of(row.view(1, 1, -1)) == place
    rows = hidden.flatten(0, 1)[:, None]
    assert ends.bests_of(rows) == before.argmax(-1).flatten().tolist()


def test_a_product_for_several_threads_has_the_same_best():
    weight = torch.randn(20_000, 1000, generator=seeded(11))
    x = torch.randn(1000, generator=seeded(12)).numpy()
    assert slices_for(weight.numel(), len(weight), 2) == 2
    screen, rows = ExactArgmax(weight), x[None] * torch.randn(3, 1000, generator=seeded(13)).numpy()
    assert screen.best(x, 2) == screen.best(x, 1)
    assert screen.bests(rows, 2) == screen.bests(rows, 1) == [screen.best(row, 1) for row in rows]


def test_a_row_of_the_embedding_is_what_the_library_embeds(tmp_path):
    save_tiny("llama", tmp_path / "model", max_shard_size="10MB")
    folder = open_folder(tmp_path / "model", memo=HashMemo(tmp_path / "hashes.json"))
    ends = load_embed_and_head(folder)
    row = ends.row_of(7)
    assert row is not None
    assert torch.equal(torch.from_numpy(row), ends.embed(torch.tensor([[7]]), 0)[0, 0])
    assert load_embed_and_head(folder, dtype=torch.bfloat16).row_of(7) is None
