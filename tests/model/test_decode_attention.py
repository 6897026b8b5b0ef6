"""Attention of decode steps over pages: next to torch's in float64, and the same bits in any batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from node.model.attention import decode  # it imports numba
from tests.page_stores import PAGE, SCALE_BITS, PageStores, in_brain


class Stores(PageStores):
    """Read by single positions."""

    def attended(self, q: Tensor, rows: list[int], seen: list[int], window: int = 0) -> Tensor:
        """The compiled answer for queries [rows, heads * head_dim], in lines that go on behind them."""
        key_heads, head_dim = self.keys.shape[1:]
        line = torch.full((len(q), q.shape[1] + 24), float("nan"))
        line[:, : q.shape[1]] = q
        out = torch.empty_like(q)
        table, lengths = np.ascontiguousarray(self.table[rows]), np.array(seen, np.int64)
        decode.attend_for(self.keys.dtype, head_dim)(
            line.data_ptr(), line.shape[1], len(q), key_heads, q.shape[1] // (key_heads * head_dim), head_dim,
            self.keys.data_ptr(), self.values.data_ptr(), table.ctypes.data, table.shape[1],
            lengths.ctypes.data, PAGE, SCALE_BITS, window, out.data_ptr(),
        )  # fmt: skip
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("key_heads", "group", "head_dim"),
    [(3, 3, 64), (2, 4, 128), (1, 7, 80), (2, 1, 96), (1, 6, 24), (2, 2, 40)],
)
def test_it_is_torchs_attention_for_heads_of_all_sizes(key_heads, group, head_dim, dtype):
    lengths = [1, 17, 600, 256, 33]
    in_pairs = dtype == torch.bfloat16 and decode.takes_pairs(head_dim)
    stores = Stores(lengths, key_heads, head_dim, dtype)
    q = torch.randn(5, key_heads * group * head_dim, generator=torch.Generator().manual_seed(1))
    for window in (0, 5, 300):
        got = stores.attended(q, list(range(5)), lengths, window)
        for row, seen in enumerate(lengths):
            expected = stores.expected(in_brain(q[row]) if in_pairs else q[row], row, seen, window)
            # Weights in bfloat16 are rounded by half of the last place at the most.
            tolerance = 3e-6 + in_pairs * 2**-8
            assert (got[row] - expected).abs().max() < tolerance * stores.values[
                stores.slots(row, seen)
            ].abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 20])
def test_a_position_has_the_same_bits_alone_and_with_others_of_its_session(dtype, window):
    stores = Stores([700, 40], 3, 64, dtype)
    rows = [0] * 18 + [1] * 3 + [0]
    seen = [*range(505, 523), 7, 8, 9, 700]
    q = torch.randn(len(rows), 9 * 64, generator=torch.Generator().manual_seed(2))
    together = stores.attended(q, rows, seen, window)
    alone = [
        stores.attended(q[i : i + 1], rows[i : i + 1], seen[i : i + 1], window) for i in range(len(rows))
    ]
    assert torch.equal(together, torch.cat(alone))
    assert torch.isfinite(together).all()


def test_no_number_stays_no_number():
    stores = Stores([300], 1, 64, torch.float32)
    q = torch.randn(1, 64, generator=torch.Generator().manual_seed(3))
    stores.keys[stores.slots(0, 300)[40]] = float("nan")
    assert stores.attended(q, [0], [300]).isnan().all()
    assert stores.attended(q, [0], [40]).isfinite().all()
    stores.keys[stores.slots(0, 300)[40]] = 0
    stores.values[stores.slots(0, 300)[41], 0, 3] = float("inf")
    got = stores.attended(q, [0], [300])
    assert got[0, 3] == float("inf")
    assert got.isfinite().sum() == 63


def test_scores_far_apart_neither_overflow_nor_vanish():
    stores = Stores([513], 1, 64, torch.float32)
    stores.keys.zero_()
    for position, score in ((3, -300.0), (300, 250.0), (512, 249.0)):
        stores.keys[stores.slots(0, 513)[position], 0, 0] = score
    q = torch.zeros(1, 64)
    q[0, 0] = 1.0
    expected = stores.expected(q[0], 0, 513)
    assert (stores.attended(q, [0], [513])[0] - expected).abs().max() < 1e-5


def test_heads_of_an_odd_size_are_refused():
    with pytest.raises(ValueError, match="heads of an even size are computed, not of 7"):
        decode.attention(torch.float32, 7)
