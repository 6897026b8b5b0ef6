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


@intrinsic  # type: ignore[untyped-decorator]
def words_at(context: Any, address: Any) -> Any:
    """An address as a pointer to int32."""

    def write(context: Any, builder: Any, signature: Any, arguments: Sequence[Any]) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(32).as_pointer())

    return types.CPointer(types.int32)(types.int64), write


@njit(nogil=True)  # type: ignore[untyped-decorator]
def shortened(number: Any) -> Any:
    """The bits of a float32, rounded to bfloat16: int32, of which the lower half is the answer.

    Rounded to the nearest, and to the even one of two, as torch rounds; NaN stays NaN.
    """
    bits = np.float32(number).view(np.int32)
    rounded = (bits + _i(0x7FFF) + ((bits >> _i(16)) & _i(1))) >> _i(16)
    return _i(0x7FC0) if (bits & _i(0x7FFFFFFF)) > _i(0x7F800000) else rounded


@njit(nogil=True)  # type: ignore[untyped-decorator]
def keep(line: Any, address: int, item_bytes: int) -> None:
    """Put float32 numbers at an address, as bfloat16 (see `shortened`) where a number has two bytes."""
    if item_bytes == 4:
        wide = carray(floats_at(address), line.size)
        for i in range(line.size):  # an assignment of slices takes a second to compile
            wide[i] = line[i]
    else:
        kept = carray(shorts_at(address), line.size)
        for i in range(line.size):
            kept[i] = np.int16(shortened(line[i]))
