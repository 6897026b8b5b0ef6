"""The limits of an adapter's manifest are kept."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tensor_codec.adapters import AdapterManifest, LoraSite, decode_manifest, encode_manifest
from tensor_codec.errors import MessageError
from tensor_codec.limits import Limits

LIMITS = Limits()


def manifest_of(sites: int) -> bytes:
    own = tuple(LoraSite(f"site_{number}", 1, 1.0) for number in range(sites))
    return encode_manifest(AdapterManifest("r", "bf16", (own,)))


def test_a_block_has_as_many_sites_as_max_adapter_sites_allows():
    most = LIMITS.max_adapter_sites
    assert len(decode_manifest(manifest_of(most), LIMITS).blocks[0]) == most
    with pytest.raises(MessageError, match=f"{most + 1} sites in a block, {most} are allowed"):
        decode_manifest(manifest_of(most + 1), LIMITS)


def test_a_manifest_is_as_long_as_max_adapter_manifest_bytes_allows():
    data = manifest_of(3)
    exact = replace(LIMITS, max_adapter_manifest_bytes=len(data))
    assert decode_manifest(data, exact).blocks
    less = replace(LIMITS, max_adapter_manifest_bytes=len(data) - 1)
    with pytest.raises(MessageError, match=f"{len(data)} bytes, {len(data) - 1} are allowed"):
        decode_manifest(data, less)


def test_a_prefix_has_as_many_virtual_tokens_as_max_adapter_virtual_tokens_allows():
    most = LIMITS.max_adapter_virtual_tokens
    blocks = ((),) * 2
    data = encode_manifest(AdapterManifest("r", "bf16", blocks, "prefix", most))
    assert decode_manifest(data, LIMITS).virtual_tokens == most
    more = encode_manifest(AdapterManifest("r", "bf16", blocks, "prefix", most + 1))
    with pytest.raises(MessageError, match=f"virtual_tokens is {most + 1}"):
        decode_manifest(more, LIMITS)
