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


def pack_rows(hidden: Tensor) -> NDArray[np.uint8]:
    """Rows [rows, hidden] of any float dtype on the CPU to bytes [rows, vector_bytes], in one pass over all.

    Raises BadResult for NaN, infinity, and values beyond bfloat16's range.
    """
    rows, width = hidden.shape
    if not rows:
        return np.empty((0, vector_bytes(OUTLIER_CODEC, width)), np.uint8)
    values = hidden.detach().to(torch.float32)
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


def unpack_rows(packed: NDArray[np.uint8], hidden: int) -> Tensor:
    """Bytes [rows, vector_bytes] to float32 [rows, hidden], in memory of its own.  Raises BadResult."""
    count = outliers_of(hidden)
    after_places = hidden + count * place_bytes(hidden)
    after_outliers = after_places + count * OUTLIER_BYTES
    codes = packed[:, :hidden].view(np.int8)
    places = _values_of(packed[:, hidden:after_places], _place_dtype(hidden)).astype(np.int64)
    outliers = torch.from_numpy(_values_of(packed[:, after_places:after_outliers], np.dtype("<i2")))
    outliers = outliers.view(torch.bfloat16).to(torch.float32)
    scale = _values_of(packed[:, after_outliers:], np.dtype("<f4"))
    _check(codes, places, scale)
    values = torch.from_numpy(codes.astype(np.float32))
    values *= torch.from_numpy(scale)
    values.scatter_(1, torch.from_numpy(places), outliers)
    if not bool(torch.isfinite(values).all()):
        raise BadResult("received hidden states hold NaN or infinity")
    return values


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
    if np.take_along_axis(codes, places, 1).any():
        raise BadResult("received hidden states hold a code at the place of an outlier")


def _place_dtype(hidden: int) -> np.dtype[Any]:  # Any: uint16 or uint32
    return np.dtype(f"<u{place_bytes(hidden)}")


def _as_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """[rows, n] of any dtype as bytes [rows, n * itemsize]."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)


def _values_of(packed: NDArray[np.uint8], dtype: np.dtype[Any]) -> NDArray[Any]:  # Any: as dtype
    """The reverse; a copy, because the columns begin anywhere and the bytes may be another's."""
    return np.array(packed).reshape(-1).view(dtype).reshape(len(packed), -1)
