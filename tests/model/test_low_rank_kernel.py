"""The compiled low-rank products: against numpy, and bit for bit the same alone and among others."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from node.model.adapters.kernels import prepare
from node.model.adapters.low_rank import Group, LowRank, SpanAdapter
from node.model.weights import low_rank_kernel as kernel

torch.set_num_threads(1)

SITES = ("one", "two")


def adapter_of(seed: int, rank: int, k: int, outs: int, dtype: torch.dtype) -> SpanAdapter:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, k, generator=generator), torch.randn(outs, rank, generator=generator)
    return SpanAdapter(str(seed), {7: {"two": LowRank(a.to(dtype), b.to(dtype), 0.3)}})


def added(
    groups: list[Group], x: np.ndarray, out: np.ndarray, first: int, outs: int, site: int = 1
) -> np.ndarray:
    """`out` with the groups' products in its columns [first, first + outs)."""
    x, out = np.ascontiguousarray(x), out.copy()
    numbers = kernel.head(len(groups))
    for group in groups:
        numbers += [group.adapter.table_at(SITES, kernel), group.first, group.last]
    updates = np.array(numbers, np.int64)
    kernel.function().ctypes(
        updates.ctypes.data, 7, site, len(SITES), x.ctypes.data, x.shape[1], out.ctypes.data + first * 4,
        out.shape[1], outs,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rank", "k", "outs"),
    [(1, 32, 16), (2, 33, 5), (3, 40, 64), (4, 64, 85), (8, 576, 192), (16, 100, 197), (65, 48, 130)],
)
def test_the_products_are_numpy_s_whatever_the_shapes_and_rows(rank, k, outs, dtype):
    generator = np.random.default_rng(rank)
    for rows in (1, 2, 3, 4, 5, 9):
        x = generator.standard_normal((rows + 2, k), np.float32)
        out = generator.standard_normal((rows + 2, outs + 7), np.float32)
        adapter = adapter_of(rows, rank, k, outs, dtype)
        low = adapter.blocks[7]["two"]
        expected = out.astype(np.float64)
        a, b = (each.double().numpy() for each in (low.a, low.b))
        expected[1 : 1 + rows, 3 : 3 + outs] += np.float32(0.3) * (x[1 : 1 + rows] @ a.T) @ b.T
        got = added([Group(adapter, 1, 1 + rows)], x, out, 3, outs)
        assert np.abs(got - expected).max() <= 2e-6 * np.abs(expected).max() * max(1, rank**0.5)
        untouched = np.ones(out.shape, bool)
        untouched[1 : 1 + rows, 3 : 3 + outs] = False
        assert np.array_equal(got[untouched], out[untouched])
        assert np.array_equal(added([Group(adapter, 0, rows)], x, out, 3, outs, site=0), out), "no such site"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_any_group(dtype):
    generator = np.random.default_rng(0)
    rows, k, outs = 11, 130, 150
    x = generator.standard_normal((rows, k), np.float32)
    out = generator.standard_normal((rows, outs), np.float32)
    one, two = (adapter_of(seed, rank, k, outs, dtype) for seed, rank in ((1, 6), (2, 16)))
    together = added([Group(one, 0, 3), Group(two, 3, 4), Group(one, 5, 11)], x, out, 0, outs)
    for row in range(rows):
        owner = {3: two, 4: None}.get(row, one)
        alone = [Group(owner, 0, 1)] if owner is not None else []
        assert np.array_equal(added(alone, x[row : row + 1], out[row : row + 1], 0, outs)[0], together[row])
    assert np.array_equal(together[4], out[4])


@pytest.mark.parametrize(
    ("fused", "dtype", "device", "needed"),
    [
        (True, torch.float32, "cpu", True),
        (False, torch.float32, "cpu", False),
        (True, torch.bfloat16, "cpu", False),
        (True, torch.float32, "meta", False),
    ],
)
def test_a_node_compiles_for_adapters_what_its_blocks_will_call(
    fused: bool, dtype: torch.dtype, device: str, needed: bool, monkeypatch: pytest.MonkeyPatch
):
    asked: list[int] = []

    def head(groups: int) -> list[int]:
        asked.append(groups)
        return [1] * kernel.HEAD

    monkeypatch.setattr(kernel, "head", head)
    span = SimpleNamespace(fused=fused, dtype=dtype, device=torch.device(device))
    assert prepare(span) is needed
    assert asked == [0] * needed


def test_b_is_kept_once_and_reads_as_before():
    low = adapter_of(1, 5, 20, 37, torch.bfloat16).blocks[7]["two"]
    before = low.b.clone()
    tiles = low.in_tiles(kernel.LANES)
    assert torch.equal(low.b, before)
    assert low.nbytes == low.a.nbytes + 48 * 5 * 2 >= low.a.nbytes + tiles.nbytes
    assert low._b is None
    assert low.in_tiles(kernel.LANES) is tiles
