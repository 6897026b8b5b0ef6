"""Attention of a prompt's chunks over pages: next to torch's in float64, and the same bits in any chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from node.model.attention import prefill, tiles  # they import numba
from node.model.weights import kernels
from tests.page_stores import PAGE, SCALE_BITS, PageStores, in_brain


class Stores(PageStores):
    """Read by chunks of positions."""

    def attended(
        self, q: Tensor, position: int, window: int = 0, rows: list[int] | None = None, threads: int = 1
    ) -> Tensor:
        """The compiled answer for queries [rows, tokens, heads * head_dim], in longer lines."""
        batch, tokens, width = q.shape
        key_heads, head_dim = self.keys.shape[1:]
        line = torch.full((batch, tokens, width + 24), float("nan"))
        line[:, :, :width] = q
        out = torch.full_like(q, float("nan"))
        table = np.ascontiguousarray(self.table[rows or [0]])
        with kernels.team(threads) as together:
            prefill.attend_for(self.keys.dtype, together=together)(
                line.data_ptr(), width + 24, batch, tokens, key_heads, width // (key_heads * head_dim),
                head_dim, self.keys.data_ptr(), self.values.data_ptr(), self.keys.element_size(),
                table.ctypes.data, table.shape[1], position, PAGE, SCALE_BITS, window, out.data_ptr(),
            )  # fmt: skip
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("key_heads", "group", "head_dim"), [(3, 3, 64), (2, 4, 128), (1, 7, 80), (2, 1, 96)]
)
@pytest.mark.parametrize(
    ("position", "tokens", "window"),
    [(0, 1, 0), (0, 70, 0), (5, 7, 0), (250, 70, 0), (511, 33, 100), (300, 9, 5), (30, 50, 1)],
)
def test_every_position_sees_those_before_it(
    position: int, tokens: int, window: int, key_heads: int, group: int, head_dim: int, dtype: torch.dtype
):
    stores = Stores([position + tokens], key_heads, head_dim, dtype)
    q = torch.randn(1, tokens, key_heads * group * head_dim)
    answer, tolerance = stores.attended(q, position, window)[0], 1e-5
    if dtype == torch.bfloat16 and tiles.PAIRS:
        q = in_brain(q)
        # Each weight is rounded by half of a bfloat16's last place at the most.
        tolerance += 2**-8 * float(stores.values[stores.slots(0, position + tokens)].abs().max())
    for number in {0, tokens // 2, tokens - 1}:
        expected = stores.expected(q[0, number], 0, position + number + 1, window)
        torch.testing.assert_close(answer[number].double(), expected, rtol=0, atol=tolerance)


@pytest.mark.skipif(not tiles.PAIRS, reason="a CPU without products of bfloat16 has one way")
def test_cpus_without_products_of_bfloat16_round_neither_queries_nor_weights(monkeypatch):
    stores, q = Stores([300], 2, 64, torch.bfloat16), torch.randn(1, 300, 4 * 64)
    monkeypatch.setattr(prefill, "PAIRS", False)
    monkeypatch.setattr(prefill, "attend_for", prefill.attend_for.__wrapped__)
    answer = stores.attended(q, 0)[0]
    for number in (0, 150, 299):
        expected = stores.expected(q[0, number], 0, number + 1)
        torch.testing.assert_close(answer[number].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [0, 40])
def test_a_prompt_has_the_same_bits_in_any_chunks_rows_and_threads(window: int):
    lengths = [600, 600]
    stores = Stores(lengths, 2, 64, torch.bfloat16)
    q = torch.randn(2, 600, 2 * 3 * 64)
    whole = torch.cat([stores.attended(q[row : row + 1], 0, window, [row]) for row in (0, 1)])
    parts = [
        stores.attended(q[:, first:last], first, window, [0, 1])
        for first, last in ((0, 1), (1, 250), (250, 513), (513, 600))
    ]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(stores.attended(q, 0, window, [0, 1], threads=2), whole)


def test_scores_of_any_size_neither_overflow_nor_vanish():
    stores = Stores([300], 1, 64, torch.float32)
    q = torch.randn(1, 300, 64) * 1e4
    answer = stores.attended(q, 0)[0]
    for number in (0, 150, 299):
        torch.testing.assert_close(
            answer[number].double(), stores.expected(q[0, number], 0, number + 1), rtol=0, atol=1e-3
        )


def test_heads_that_are_no_whole_vectors_are_left_to_torch():
    assert not prefill.is_chosen(kernels.LANES + 2)
