"""From the bytes of a block's blob to its low-rank matrices, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from node.model.adapters.low_rank import BlockAdapter, LowRank
from tensor_codec.adapters import LoraSite, blob_bytes
from tensor_codec.errors import MessageError
from tensor_codec.frame import Buffer

MAX_VALUE = 1e4  # trained values are below 10; far below what overflows a row of float32 or bfloat16
DTYPES: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


def read_block(
    sites: Sequence[LoraSite],
    shapes: Mapping[str, tuple[int, int]],
    dtype: str,
    blob: Buffer,
    device: torch.device | str = "cpu",
) -> BlockAdapter:
    """A block's part of an adapter, out of its blob; the values are copied.

    sites: of the block, in the order of the blob.  shapes: (in, out) of its linears by name.  dtype: "bf16"
    or "fp32".  Raises MessageError for another size, for a site that the block lacks, and for a value that is
    not finite or above MAX_VALUE.
    """
    expected = blob_bytes(sites, shapes, dtype)
    if len(blob) != expected:
        raise MessageError(f"a blob of an adapter has {len(blob)} bytes, its sites take {expected}")
    if not sites:
        return {}
    writable = blob if isinstance(blob, bytearray) else bytearray(blob)  # as torch wants it; nothing writes
    values = torch.frombuffer(writable, dtype=DTYPES[dtype])
    found, begin = {}, 0
    for site in sites:
        ins, outs = shapes[site.name]
        middle, end = begin + site.rank * ins, begin + site.rank * (ins + outs)
        _check(values[begin:end])
        a, b = values[begin:middle].view(site.rank, ins), values[middle:end].view(outs, site.rank)
        # A copy each: B moves into the kernels' order later, and its place would stay taken.
        found[site.name] = LowRank(a.to(device, copy=True), b.to(device, copy=True), site.scale)
        begin = end
    return found


def _check(values: Tensor) -> None:
    low, high = (float(each) for each in values.float().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):  # NaN comes through as NaN
        raise MessageError("an adapter holds NaN or infinity")
    if max(-low, high) > MAX_VALUE:
        raise MessageError(f"an adapter holds {max(-low, high):g}, {MAX_VALUE:g} is the largest allowed")
