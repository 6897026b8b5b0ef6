"""The answers of the compiled kernels for one set of inputs: python -m tests.kernel_answers FILE

A process compiles for one form of CPU: NUMBA_CPU_NAME and NUMBA_CPU_FEATURES choose another one than the
machine's.  So a test compares the answers of two processes.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from node.model.attention import decode, prefill
from node.model.weights import kernels
from node.model.weights.panels import panel_kernels
from tests.page_stores import PAGE, SCALE_BITS, PageStores

LANES = "lanes"
SHAPES = ((70, 199), (5, 3101), (96, 576), (33, 64))  # of matrices: outputs, numbers of a row
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 17, 40)  # of x
POSITIONS = 300
KEY_HEADS, GROUP, HEAD = 2, 3, 64


def answers() -> dict[str, Tensor]:
    """float32 answers by their names, for instance "int8 70 x 199, 3 rows"; and the lanes."""
    torch.set_num_threads(1)
    found = {LANES: torch.tensor(kernels.LANES)}
    for dtype in (torch.int8, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        for outs, width in SHAPES:
            rows, x = matrix(dtype, outs, width)
            for count in ROWS:
                found[f"{kind} {outs} x {width}, {count} rows"] = rows(x[:count])
            if panel_kernels.takes(rows.weight):
                found[f"{kind} {outs} x {width}, panels"] = over_panels(rows, x)
    q = torch.randn(POSITIONS, KEY_HEADS * GROUP * HEAD, generator=torch.Generator().manual_seed(4))
    for dtype in (torch.float32, torch.bfloat16):
        stores = PageStores([POSITIONS], KEY_HEADS, HEAD, dtype)
        kind = str(dtype).removeprefix("torch.")
        found[f"attention {kind}, decode"] = decoded(stores, q)
        found[f"attention {kind}, prefill"] = prefilled(stores, q)
    return found


def matrix(dtype: torch.dtype, outs: int, width: int) -> tuple[kernels.Rows, Tensor]:
    """A matrix of random numbers with a bias, and rows for it; one is zeros, one has large numbers."""
    generator = torch.Generator().manual_seed(outs)
    bias, x = (torch.randn(size, generator=generator) for size in ((outs,), (max(ROWS), width)))
    x[2], x[3] = 0, x[3] * 1e4
    if dtype == torch.int8:
        codes = torch.randint(-127, 128, (outs, width), dtype=dtype, generator=generator)
        return kernels.Rows(codes, torch.rand(outs, generator=generator) + 0.01, bias), x
    return kernels.Rows(torch.randn(outs, width, generator=generator).to(dtype), None, bias), x


def over_panels(rows: kernels.Rows, x: Tensor) -> Tensor:
    """The product by the kernel of many rows, whatever is faster."""
    weight, scale, bias, out = rows.weight, rows.scale, rows.bias, torch.empty(len(x), rows.outs)
    assert bias is not None
    cast("partial[None]", kernels.kernel_for(weight.dtype)).func(
        panel_kernels.product_of(weight.dtype).address, 0, weight.element_size(), x.data_ptr(),
        weight.data_ptr(), 0 if scale is None else scale.data_ptr(), bias.data_ptr(), out.data_ptr(), len(x),
        rows.outs, rows.k, rows.outs, 1,
    )  # fmt: skip
    return out


def decoded(stores: PageStores, q: Tensor) -> Tensor:
    """Attention of the last position alone."""
    out, seen = torch.empty(1, q.shape[1]), np.array([POSITIONS], np.int64)
    decode.attend_for(stores.keys.dtype, HEAD)(
        q[-1:].data_ptr(), q.shape[1], 1, KEY_HEADS, GROUP, HEAD, stores.keys.data_ptr(),
        stores.values.data_ptr(), stores.table.ctypes.data, stores.table.shape[1], seen.ctypes.data, PAGE,
        SCALE_BITS, 0, out.data_ptr(),
    )  # fmt: skip
    return out


def prefilled(stores: PageStores, q: Tensor) -> Tensor:
    """Attention of all positions as one prompt."""
    out = torch.empty_like(q)
    prefill.attend_for(stores.keys.dtype, together=False)(
        q.data_ptr(), q.shape[1], 1, POSITIONS, KEY_HEADS, GROUP, HEAD, stores.keys.data_ptr(),
        stores.values.data_ptr(), stores.keys.element_size(), stores.table.ctypes.data, stores.table.shape[1],
        0, PAGE, SCALE_BITS, 0, out.data_ptr(),
    )  # fmt: skip
    return out


if __name__ == "__main__":
    torch.save(answers(), sys.argv[1])
