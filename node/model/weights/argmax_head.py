"""The likeliest token of a large vocabulary, exactly, by reading little more than a quarter of its head.

A head reads its whole matrix for every token, and greedy decoding wants only the row with the largest
product with the hidden state.  So the matrix is kept once more in int8 rows.  The error of their product
with x is at most (Cauchy and Schwarz)

    |w x - w8 x8|  <=  |w - w8| |x|  +  step / 2 * sum |w8|  +  rounding

|w - w8| and sum |w8| of each row are known beforehand; `step` is the step of rounding x to 16 bits.  Rows
that cannot be the largest within these bounds are left out.  The few other rows are computed in float32,
with the bits of the whole product.  Measured with SmolLM2-135M's 49,152 rows: 7 of them on the average, 45
at most; 1.4 ms in place of 7.

Norm, products, bounds and what is left are two calls of compiled code: between two tokens the caches hold
weights, and each operation of torch begins with reading its own code.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit, types
from numpy.typing import NDArray
from torch import Tensor

from node.model.weights.arena import WeightArena, arena_bytes
from node.model.weights.compiling import Kernel, compiled
from node.model.weights.decode_kernels import _normed
from node.model.weights.kernels import LARGEST, Rows, call_at, product_of, slices_for
from node.model.weights.quantize import dequantize_rows, quantize_rows

PIECE_VALUES = 1 << 20  # weights that the first pass reads together: they stay in the cache
MAX_LEFT = 1 / 16  # of the rows: when more are left, all are computed
EPSILON = 2.0**-24
_f = np.float32
_MARGIN = _f(1.0001)  # for the rounding of the bounds themselves


def _normed_rows(x: Any, weight: Any, eps: Any, out: Any) -> None:
    _normed(x, weight, eps, out)


@cache
def norm_kernel() -> Kernel:
    """RMSNorm (arXiv:1910.07467): (x float32 [rows, k], weight [k], eps, out [rows, k])."""
    signature = "void(float32[:, ::1], float32[::1], float32, float32[:, ::1])"
    return compiled(_normed_rows, signature, fastmath={"reassoc", "nsz", "contract", "arcp"})


def _screened(
    products: Any, matrices: Any, scale: Any, bounds: Any, x: Any, out: Any, rounding: Any, is_given: Any
) -> Any:
    """Put the products that may be the largest into `out` [outs], -inf for the others.

    products: addresses of `product_of` int8 and float32.  matrices: of the codes and of the weights.
    bounds: [3, outs]: of each row the norm of its error, its norm, the sum of its codes' sizes.
    is_given: `out` holds the products with the codes.  Answers the place of the first largest one; all of
    `out` is to be computed where it is -1.
    """
    outs, k = scale.size, x.size
    total, most = _f(0), _f(0)
    for i in range(k):
        total += x[i] * x[i]
        most = max(most, abs(x[i]))
    norm = np.sqrt(total)
    if not norm < _f(np.inf):
        return -1
    x_at, out_at = x.ctypes.data, out.ctypes.data
    if not is_given:
        call_at(products[0], (1, x_at, matrices[0], scale.ctypes.data, 0, out_at, 1, outs, k, outs))
    errors, norms, sums = bounds[0], bounds[1], bounds[2]
    by_error, by_norm, by_sum = norm * _MARGIN, norm * rounding, most * _f(0.5 / LARGEST) * _MARGIN
    least = -_f(np.inf)
    for i in range(outs):
        bound = errors[i] * by_error + norms[i] * by_norm + sums[i] * by_sum
        least = max(least, out[i] - bound)
        out[i] += bound
    left, most_left, best = 0, int(outs * MAX_LEFT), -1
    exact = np.empty(1, np.float32)
    for i in range(outs):
        if out[i] >= least:
            left += 1
            if left > most_left:
                return -1
            at = matrices[1] + i * k * 4
            call_at(products[1], (4, x_at, at, 0, 0, exact.ctypes.data, 1, 1, k, 1))
            out[i] = exact[0]
            if best < 0 or out[i] > out[best]:
                best = i
        else:
            out[i] = -_f(np.inf)
    return best


# No comparison here meets NaN, which a norm without bound has kept away.
_FASTMATH = {"nnan", "nsz", "contract"}
_screen_row = njit(nogil=True, fastmath=_FASTMATH)(_screened)


@cache
def screen_kernel() -> Kernel:
    """See `_screened`."""
    pair, row = types.UniTuple(types.int64, 2), types.float32[::1]
    signature = types.int64(pair, pair, row, types.float32[:, ::1], row, row, types.float32, types.boolean)
    return compiled(_screened, signature, fastmath=_FASTMATH)


def _screened_rows(
    products: Any, matrices: Any, scale: Any, bounds: Any, x: Any, out: Any, rounding: Any, places: Any
) -> None:
    """`_screened` of each row of x [rows, k], into out [rows, outs], and its answer into places [rows]."""
    (rows, k), outs = x.shape, scale.size
    x_at, out_at = x.ctypes.data, out.ctypes.data
    call_at(products[0], (1, x_at, matrices[0], scale.ctypes.data, 0, out_at, rows, outs, k, outs))
    for row in range(rows):
        places[row] = _screen_row(products, matrices, scale, bounds, x[row], out[row], rounding, True)


@cache
def screen_rows_kernel() -> Kernel:
    """See `_screened_rows`."""
    pair, row, table = types.UniTuple(types.int64, 2), types.float32[::1], types.float32[:, ::1]
    signature = types.void(pair, pair, row, table, table, table, types.float32, types.int64[::1])
    return compiled(_screened_rows, signature, fastmath=_FASTMATH)


class ExactArgmax:
    """A head's matrix float32 [outs, k] on the CPU, without a bias.

    Promise, checked by tests/model/test_argmax_head.py: the first largest number of a row of the answer has
    the place and the bits that it has in the whole product.
    """

    def __init__(self, weight: Tensor) -> None:
        """Takes 0.2 s for 28 million weights.  Raises ValueError for NaN and infinity."""
        self._weight = weight
        outs, k = weight.shape
        codes, scale = torch.empty(outs, k, dtype=torch.int8), torch.empty(outs)
        bounds = torch.empty(3, outs)
        error, norm, total = bounds
        pieces = max(1, PIECE_VALUES // k)
        for first in range(0, outs, pieces):
            rows = slice(first, first + pieces)
            codes[rows], scale[rows] = quantize_rows(weight[rows])
            kept = dequantize_rows(codes[rows], scale[rows], torch.float32)
            norm[rows] = torch.linalg.vector_norm(weight[rows], dim=1)
            total[rows] = torch.linalg.vector_norm(kept, ord=1, dim=1)
            error[rows] = torch.linalg.vector_norm(kept.sub_(weight[rows]), dim=1)
        arena = WeightArena(arena_bytes([codes, scale, bounds]))
        codes, scale, bounds = (arena.joined([each]) for each in (codes, scale, bounds))
        self._coarse = Rows(codes, scale, None)
        self._whole = Rows(weight, None, None)
        # Of either product: additions one after the other in a lane, then the remaining ones.
        self._rounding = 2 * EPSILON * (k / 8 + 32)
        self._screen = screen_kernel()
        self._products = product_of(torch.int8).address, product_of(torch.float32).address
        self._matrices = codes.data_ptr(), weight.data_ptr()
        self._scale, self._bounds = scale.numpy(), bounds.numpy()
        self._unused: list[
            NDArray[np.float32]
        ] = []  # memory for products, which the allocator would map anew
        self._table = np.empty((0, outs), np.float32)  # the same for several rows

    def __call__(self, x: Tensor, threads: int) -> Tensor:
        """x: float32 [rows, k] -> [rows, outs]: the products that may be the largest, -inf for the others."""
        found = self._coarse(x, threads)
        for row in range(len(x)):
            if self._place(x[row].contiguous().numpy(), found[row].numpy(), is_given=True) < 0:
                found[row] = self._whole(x[row : row + 1], threads)[0]
        return found

    def best(self, x: NDArray[np.float32], threads: int) -> int:
        """x: [k] -> the place of the first largest product."""
        outs, k = self._weight.shape
        if slices_for(outs * k, outs, threads) > 1:
            return int(self(torch.from_numpy(x)[None], threads).numpy().argmax())
        out = self._unused.pop() if self._unused else np.empty(outs, np.float32)
        place = self._place(x, out, is_given=False)
        self._unused.append(out)
        if place < 0:
            place = int(self._whole(torch.from_numpy(x)[None], threads).numpy().argmax())
        return place

    def bests(self, x: NDArray[np.float32], threads: int) -> list[int]:
        """x: [rows, k] -> of each row the place of the first largest product.  One call of compiled code.

        Where threads pay, the products are divided among them first.
        """
        outs, k = self._weight.shape
        if slices_for(len(x) * outs * k, outs, threads) > 1:
            return [int(place) for place in self(torch.from_numpy(x), threads).numpy().argmax(1)]
        if len(self._table) < len(x):
            self._table = np.empty((len(x), outs), np.float32)
        table, self._table = self._table, self._table[:0]  # nobody else has it meanwhile
        places = np.empty(len(x), np.int64)
        given = self._products, self._matrices, self._scale, self._bounds
        screen_rows_kernel()(*given, x, table[: len(x)], self._rounding, places)
        self._table = table
        for row in np.flatnonzero(places < 0):
            places[row] = self._whole(torch.from_numpy(x[row : row + 1]), threads).numpy().argmax()
        return [int(place) for place in places]

    def _place(self, x: NDArray[np.float32], out: NDArray[np.float32], *, is_given: bool) -> int:
        return int(
            self._screen(
                self._products, self._matrices, self._scale, self._bounds, x, out, self._rounding, is_given
            )
        )
