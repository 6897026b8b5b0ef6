"""Writes keys and values into the stores of a page pool, in float32 or bfloat16.

Importing this module imports numba.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from node.model.weights.kernels import floats_at

_i = np.int32


@intrinsic  # type: ignore[untyped-decorator]
def shorts_at(context: Any, address: Any) -> Any:
    """An address as a pointer to int16."""

    def write(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(16).as_pointer())

    return types.CPointer(types.int16)(types.int64), write


@njit(nogil=True)  # type: ignore[untyped-decorator]
def keep(line: Any, address: int, item_bytes: int) -> None:
    """Put float32 numbers at an address, as bfloat16 where a number has two bytes.

    Rounded to the nearest, and to the even one of two, as torch rounds; NaN stays NaN.
    """
    if item_bytes == 4:
        wide = carray(floats_at(address), line.size)
        for i in range(line.size):  # an assignment of slices takes a second to compile
            wide[i] = line[i]
    else:
        kept, bits = carray(shorts_at(address), line.size), line.view(np.int32)
        for i in range(line.size):
            number = bits[i]
            rounded = (number + _i(0x7FFF) + ((number >> _i(16)) & _i(1))) >> _i(16)
            is_nan = (number & _i(0x7FFFFFFF)) > _i(0x7F800000)
            kept[i] = np.int16(_i(0x7FC0) if is_nan else rounded)
