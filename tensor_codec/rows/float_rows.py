"""Rows of fp32 or bf16 to numpy's float32 and back: the way of a single token.

For a row or two torch's dispatch costs more than the work.  After a pass over the weights, with no code left
in the processor's caches, it takes 45 us to read a row of 576 values and 60 us to write it, numpy about 12.
`tensor_codec.codecs` does the same for tensors of any size, with equal bytes.
"""

from __future__ import annotations

from typing import cast

import numpy as np
from numpy.typing import NDArray

from tensor_codec.errors import BadResult
from tensor_codec.frame import Buffer

ROW_CODECS = frozenset({"fp32", "bf16"})
_MAGNITUDE = np.uint32(0x7FFFFFFF)  # the bits of a float32 without its sign
_ROUNDS_TO_INFINITY = np.uint32(0x7F7F8000)  # the least magnitude that is infinite, or no number, in bf16


def row_values(body: Buffer, codec: str) -> NDArray[np.float32]:
    """The values of an encoded body, float32 [values], in memory of their own.

    codec: fp32 or bf16.  The body's size was checked by `messages`.  Raises BadResult if a value is NaN or
    infinite.
    """
    if codec == "bf16":
        wide = np.frombuffer(body, np.uint16).astype(np.uint32)
        wide <<= 16
        values = wide.view(np.float32)
    else:
        # A copy of bytes, because the body starts anywhere in its frame.
        values = np.frombuffer(body, np.uint8).copy().view(np.float32)
    if not are_true(np.isfinite(values)):
        raise BadResult("received hidden states hold NaN or infinity")
    return values


def row_bytes(values: NDArray[np.float32], codec: str) -> memoryview:
    """Contiguous float32 values as bytes of fp32, in the memory of the values, or of bf16.

    bf16 rounds to the nearest, to even between two, as torch does.  Raises BadResult if a value is NaN or
    infinite in the codec.
    """
    if codec == "bf16":
        bits = values.reshape(-1).view(np.uint32)
        finite = (bits & _MAGNITUDE) < _ROUNDS_TO_INFINITY
        rounded = bits >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        values = rounded.astype(np.uint16)
    else:
        finite = np.isfinite(values)
    if not are_true(finite):
        raise BadResult("computed hidden states hold NaN or infinity")
    return memoryview(cast(bytes, values)).cast("B")  # mypy does not see that arrays are buffers


def are_true(flags: NDArray[np.bool_]) -> bool:
    """Whether all are: a search through their bytes, half the time of `all` for a row."""
    return b"\0" not in flags.tobytes()
