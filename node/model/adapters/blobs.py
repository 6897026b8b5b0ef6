"""From the bytes of a block's blob to its low-rank matrices, or its part of a prefix, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from node.model.adapters.low_rank import BlockAdapter, LowRank, SpanAdapter
from node.model.adapters.prefix import AnySpanAdapter, KeyValues, SpanPrefix
from tensor_codec.adapters import PREFIX, LoraSite, blob_bytes
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
) -> BlockAdapter | KeyValues:
    """A block's part of an adapter, out of its blob; the values are copied.

    sites: `AdapterManifest.parts` of the block, in the order of the blob.  shapes: see `blob_bytes`.  dtype:
    "bf16" or "fp32".  Raises MessageError for another size, for a site that the block lacks, and for a value
    that is not finite or above MAX_VALUE.
    """
    if not sites or sites[0].name != PREFIX:
        return read_lora(sites, shapes, dtype, blob, device)
    keys, own = _values(sites, shapes, dtype, blob).view(2, sites[0].rank, -1)
    _check(keys)
    _check(own)
    return KeyValues(keys.to(device, copy=True), own.to(device, copy=True))


def read_lora(
    sites: Sequence[LoraSite],
    shapes: Mapping[str, tuple[int, int]],
    dtype: str,
    blob: Buffer,
    device: torch.device | str = "cpu",
) -> BlockAdapter:
    """`read_block` of an adapter of kind "lora"."""
    values = _values(sites, shapes, dtype, blob)
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


def _values(
    sites: Sequence[LoraSite], shapes: Mapping[str, tuple[int, int]], dtype: str, blob: Buffer
) -> Tensor:
    expected = blob_bytes(sites, shapes, dtype)
    if len(blob) != expected:
        raise MessageError(f"a blob of an adapter has {len(blob)} bytes, its sites take {expected}")
    if not blob:
        return torch.empty(0, dtype=DTYPES[dtype])
    writable = blob if isinstance(blob, bytearray) else bytearray(blob)  # as torch wants it; nothing writes
    return torch.frombuffer(writable, dtype=DTYPES[dtype])


def span_adapter(id: str, blocks: Mapping[int, BlockAdapter | KeyValues]) -> AnySpanAdapter:
    """What a span computes with, of what `read_block` has made of the blobs of its blocks."""
    kept = {block: own for block, own in blocks.items() if isinstance(own, KeyValues)}
    if kept:
        return SpanPrefix(id, kept)
    return SpanAdapter(id, {block: own for block, own in blocks.items() if not isinstance(own, KeyValues)})


def _check(values: Tensor) -> None:
    low, high = (float(each) for each in values.float().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):  # NaN comes through as NaN
        raise MessageError("an adapter holds NaN or infinity")
    if max(-low, high) > MAX_VALUE:
        raise MessageError(f"an adapter holds {max(-low, high):g}, {MAX_VALUE:g} is the largest allowed")
