"""Rows of int8 whose largest values are kept apart: the codec `int8o`.

The residual stream has a few values that are thousands of times larger than the others (LLM.int8(),
arXiv:2208.07339).  With one scale for a whole row they would leave nothing of the others: KL 2.9e-2 over one
boundary of SmolLM2.  Kept apart, eight values of a row: 6.5e-5.

A row of `hidden` values on the wire, little-endian:

    codes      hidden x int8, -127..127; 0 at the places of the outliers
    places     outliers x uint16 (uint32 above 65,536 values), ascending
    outliers   outliers x bfloat16
    scale      float32; a value is its code times the scale

The scale has 17 significant bits, so code times scale is exact in float32, and the largest code is 127.  For
this reason a row that was decoded encodes to the same values again: what was sent once can be kept in fp32,
and a replay sends the same values (`test_a_second_encoding_changes_nothing`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tensor_codec.errors import BadResult
from tensor_codec.messages.contract import (
    OUTLIER_BYTES,
    OUTLIER_CODEC,
    outliers_of,
    place_bytes,
    vector_bytes,
)

LARGEST_CODE = 127
LEAST_SCALE = 2.0**-120  # below it: 0, so that no product with a code is subnormal
_KEPT_BITS = ~0x7F  # of a float32: 16 of the 23 bits of its fraction
_INFINITE = 0x7F80  # the exponent of a bfloat16 that is infinite or NaN
FEW_ROWS = 8  # from here on torch is faster


def pack_rows(hidden: Tensor) -> NDArray[np.uint8]:
    """Rows [rows, hidden] of any float dtype on the CPU to bytes [rows, vector_bytes], in one pass over all.

    Raises BadResult for NaN, infinity, and values beyond bfloat16's range.
    """
    rows, width = hidden.shape
    values = hidden.detach().to(torch.float32)
    if rows <= FEW_ROWS:
        return _pack_few(values.numpy())
    count = outliers_of(width)
    largest, places = values.abs().topk(min(count + 1, width), dim=1)
    bounds = largest.to(torch.bfloat16).to(torch.float32)
    if not bool(torch.isfinite(bounds).all()):  # topk puts NaN first
        raise BadResult("computed hidden states hold NaN or infinity")
    scale = _scales(bounds[:, count:])
    places = places[:, :count].sort(dim=1).values
    codes = (values / torch.where(scale > 0, scale, 1.0)).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)
    codes *= scale > 0
    codes.scatter_(1, places, 0.0)
    packed = np.empty((rows, vector_bytes(OUTLIER_CODEC, width)), np.uint8)
    after_places = width + count * place_bytes(width)
    packed[:, :width] = codes.to(torch.int8).numpy().view(np.uint8)
    packed[:, width:after_places] = _as_bytes(places.numpy().astype(_place_dtype(width)))
    outliers = values.gather(1, places).to(torch.bfloat16)
    packed[:, after_places : after_places + count * OUTLIER_BYTES] = _as_bytes(
        outliers.view(torch.int16).numpy()
    )
    packed[:, after_places + count * OUTLIER_BYTES :] = _as_bytes(scale.numpy())
    return packed


def _pack_few(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """`pack_rows` of few rows: for one row torch's calls take longer than their work."""
    rows, width = values.shape
    if not np.isfinite(values).all():
        raise BadResult("computed hidden states hold NaN or infinity")
    count, each = outliers_of(width), np.arange(rows)[:, None]
    largest = width - count - 1  # after a partition: of the values that are not kept apart
    sizes = np.abs(values)
    order = np.argpartition(sizes, largest, axis=1)
    places = np.sort(order[:, largest + 1 :], axis=1)
    outliers, bounds = (
        _bfloat16(values[each, places]),
        _bfloat16(sizes[each, order[:, largest : largest + 1]]),
    )
    if ((outliers & _INFINITE) == _INFINITE).any() or (bounds == _INFINITE).any():
        raise BadResult("computed hidden states hold values beyond bfloat16's range")
    scale = ((_widened(bounds) / np.float32(LARGEST_CODE)).view(np.uint32) & np.uint32(0xFFFFFF80)).view(
        np.float32
    )
    scale[scale < LEAST_SCALE] = 0.0
    with np.errstate(over="ignore"):  # an outlier's code is none
        codes = np.rint(values / np.where(scale > 0, scale, np.float32(1)))
    codes = np.clip(codes, -LARGEST_CODE, LARGEST_CODE).astype(np.int8)
    codes[scale[:, 0] == 0] = 0
    codes[each, places] = 0
    parts = (codes, places.astype(_place_dtype(width)), outliers.astype("<u2"), scale)
    return np.concatenate([part.view(np.uint8) for part in parts], axis=1)


def unpack_rows(packed: NDArray[np.uint8], hidden: int) -> Tensor:
    """Bytes [rows, vector_bytes] to float32 [rows, hidden], in memory of its own.  Raises BadResult."""
    count = outliers_of(hidden)
    after_places = hidden + count * place_bytes(hidden)
    after_outliers = after_places + count * OUTLIER_BYTES
    codes = packed[:, :hidden].view(np.int8)
    places = _values_of(packed[:, hidden:after_places], _place_dtype(hidden)).astype(np.int64)
    outliers = _widened(_values_of(packed[:, after_places:after_outliers], np.dtype("<u2")))
    scale = _values_of(packed[:, after_outliers:], np.dtype("<f4"))
    _check(codes, places, scale)
    values = codes.astype(np.float32)
    with np.errstate(over="ignore"):
        values *= scale
    values[np.arange(len(places))[:, None], places] = outliers
    if not np.isfinite(values).all():
        raise BadResult("received hidden states hold NaN or infinity")
    return torch.from_numpy(values)


def _scales(bound: Tensor) -> Tensor:
    """Of rows whose largest value but for the outliers is about `bound`, [rows, 1]; 0 for rows of nothing.

    Rounded towards 0: the largest code times its scale is no larger than any outlier, so a second encoding
    keeps equal values apart.
    """
    if not bound.numel():
        return torch.zeros(len(bound), 1)
    scale = (bound / LARGEST_CODE).contiguous()
    scale = (scale.view(torch.int32) & _KEPT_BITS).view(torch.float32)
    return torch.where(scale >= LEAST_SCALE, scale, 0.0)


def _check(codes: NDArray[np.int8], places: NDArray[np.int64], scale: NDArray[np.float32]) -> None:
    """Raise BadResult for what `pack_rows` never makes."""
    hidden = codes.shape[1]
    if not (np.isfinite(scale) & (scale >= 0)).all():
        raise BadResult("received hidden states hold NaN or infinity, or a scale below 0")
    if (codes == -128).any():
        raise BadResult("received hidden states hold the code -128, -127 to 127 are allowed")
    if not places.size:
        return
    if (beyond := int(places.max())) >= hidden:
        raise BadResult(f"received hidden states hold an outlier at place {beyond}, a row has {hidden}")
    if (places[:, 1:] <= places[:, :-1]).any():
        raise BadResult("received hidden states hold outliers whose places do not ascend")
    if codes[np.arange(len(places))[:, None], places].any():
        raise BadResult("received hidden states hold a code at the place of an outlier")


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of finite values in bfloat16, rounded to the nearest, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Values of bfloat16 in float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _place_dtype(hidden: int) -> np.dtype[Any]:  # Any: uint16 or uint32
    return np.dtype(f"<u{place_bytes(hidden)}")


def _as_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """[rows, n] of any dtype as bytes [rows, n * itemsize]."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)


def _values_of(packed: NDArray[np.uint8], dtype: np.dtype[Any]) -> NDArray[Any]:  # Any: as dtype
    """The reverse; a copy, because the columns begin anywhere and the bytes may be another's."""
    return np.array(packed).reshape(-1).view(dtype).reshape(len(packed), -1)
