"""Pages of keys and values as a page pool has them, and what torch finds in them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

PAGE = 16
SCALE = 0.3
SCALE_BITS = int(np.float32(SCALE).view(np.int32))


class PageStores:
    """Keys and values of rows of some lengths, their pages in any order among those of others."""

    def __init__(self, lengths: list[int], key_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(sum(lengths))
        most = -(-max(lengths) // PAGE)
        pages = torch.randperm(most * len(lengths), generator=generator).view(len(lengths), most)
        self.table = pages.numpy().astype(np.int64)
        shape = (PAGE * pages.numel(), key_heads, head_dim)
        self.keys, self.values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        for row, length in enumerate(lengths):  # others may have left anything there
            slots = self.slots(row, most * PAGE)[length:]
            self.keys[slots] = self.values[slots] = float("nan")

    def slots(self, row: int, length: int) -> Tensor:
        positions = np.arange(length)
        return torch.from_numpy(self.table[row][positions // PAGE] * PAGE + positions % PAGE)

    def expected(self, q: Tensor, row: int, seen: int, window: int = 0) -> Tensor:
        """torch's answer in float64 for one row's queries, [heads * head_dim]."""
        slots = self.slots(row, seen)[max(0, seen - window) if window else 0 :]
        keys, values = (store[slots].double().transpose(0, 1)[None] for store in (self.keys, self.values))
        queries = q.double().view(1, -1, 1, self.keys.shape[2])
        return functional.scaled_dot_product_attention(
            queries, keys, values, scale=SCALE, enable_gqa=True
        ).flatten()


def in_brain(q: Tensor) -> Tensor:
    """Queries as kernels round them to bfloat16, which is after they are scaled: float64."""
    factor = float(np.float32(SCALE) * np.float32(1.4426950408889634))
    return (q * factor).bfloat16().double() / factor
