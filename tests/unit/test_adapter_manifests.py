"""An adapter's manifest as bytes, its id, and the sizes of its blobs."""

from __future__ import annotations

import struct
from contextlib import suppress
from dataclasses import replace

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tensor_codec.adapters import (
    AdapterContent,
    AdapterManifest,
    LoraSite,
    adapter_id,
    blob_bytes,
    blob_digest,
    decode_manifest,
    encode_manifest,
    is_adapter_id,
    site_bytes,
)
from tensor_codec.errors import MessageError
from tensor_codec.limits import Limits

LIMITS = Limits()
Q, V = LoraSite("q_proj", 8, 2.0), LoraSite("v_proj", 4, 0.5)
MANIFEST = AdapterManifest("r1", "bf16", ((Q, V), (), (V,), (Q, V)))
DIGESTS = [blob_digest(bytes([block])) for block in range(4)]
SITES = st.builds(
    LoraSite,
    st.sampled_from(["q_proj", "k_proj", "c_attn", "fc1", "down_proj"]),
    st.integers(1, LIMITS.max_adapter_rank),
    st.floats(-1e4, 1e4, allow_subnormal=False),
)
BLOCKS = st.lists(st.lists(SITES, max_size=3, unique_by=lambda site: site.name).map(tuple), min_size=1)


@given(blocks=BLOCKS, dtype=st.sampled_from(["bf16", "fp32"]))
def test_a_manifest_is_read_as_it_was_written(blocks, dtype):
    manifest = AdapterManifest("r1", dtype, tuple(blocks))
    assert decode_manifest(encode_manifest(manifest), LIMITS) == manifest


def test_a_prefix_is_read_as_it_was_written():
    manifest = AdapterManifest("r1", "fp32", ((), ()), "prefix", 20)
    assert decode_manifest(encode_manifest(manifest), LIMITS) == manifest


def test_a_large_manifest_of_different_blocks_fits_its_limit():
    names = [f"{name}_proj" for name in "qkvogud"]
    blocks = tuple(
        tuple(LoraSite(name, 1 + (b + i) % 64, b / 7) for i, name in enumerate(names)) for b in range(200)
    )
    manifest = AdapterManifest("r" * 128, "bf16", blocks)
    packed = encode_manifest(manifest)
    assert len(packed) < 17 * 1024
    assert decode_manifest(packed, LIMITS) == manifest


def test_the_id_is_64_digits_and_follows_from_every_part():
    changes = [
        replace(MANIFEST, revision="r2"),
        replace(MANIFEST, dtype="fp32"),
        replace(MANIFEST, blocks=((Q, V), (), (V,), (V, Q))),
        replace(MANIFEST, blocks=((Q, V), (), (replace(V, rank=5),), (Q, V))),
        replace(MANIFEST, blocks=((Q, V), (), (replace(V, scale=0.25),), (Q, V))),
        replace(MANIFEST, blocks=((), (), (), ())),
        replace(MANIFEST, blocks=((), (), (), ()), kind="prefix", virtual_tokens=1),
    ]
    ids = {adapter_id(each, DIGESTS) for each in [MANIFEST, *changes]}
    ids |= {adapter_id(MANIFEST, [*DIGESTS[:3], blob_digest(b"other")]), adapter_id(MANIFEST, DIGESTS[::-1])}
    assert len(ids) == 10
    assert all(is_adapter_id(each) for each in ids)
    assert adapter_id(decode_manifest(encode_manifest(MANIFEST), LIMITS), DIGESTS) == adapter_id(
        MANIFEST, DIGESTS
    )


def test_the_id_of_an_adapter_stays_over_versions():
    assert adapter_id(MANIFEST, DIGESTS) == "d37eb57da5cc86fb59b31e2daebca47df1ccf3653c96506b41c3488cdf6b9df5"


def test_an_id_needs_a_digest_of_every_block():
    with pytest.raises(ValueError, match="3 digests of 4 blobs"):
        adapter_id(MANIFEST, DIGESTS[:3])


@pytest.mark.parametrize("name", ["poems", "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n"])
def test_a_name_is_no_id(name):
    assert not is_adapter_id(name)


def test_sizes_are_those_of_a_and_b_of_every_site():
    shapes = {"q_proj": (576, 576), "v_proj": (576, 192)}
    assert site_bytes(Q, 576, 576, "bf16") == 2 * 8 * (576 + 576)
    assert site_bytes(V, 576, 192, "fp32") == 4 * 4 * (576 + 192)
    assert blob_bytes((Q, V), shapes, "bf16") == 2 * (8 * 1152 + 4 * 768)
    assert blob_bytes((), shapes, "bf16") == 0


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ((LoraSite("gate", 8, 1.0),), "an adapter's site 'gate', the block has q_proj, v_proj"),
        ((LoraSite("v_proj", 49, 1.0),), "rank 49 at 'v_proj' of 64 x 48"),
    ],
)
def test_a_site_that_does_not_fit_the_block_is_refused(sites, message):
    with pytest.raises(MessageError) as error:
        blob_bytes(sites, {"q_proj": (64, 64), "v_proj": (64, 48)}, "bf16")
    assert str(error.value) == message


FIELDS = {
    "revision": "r1", "dtype": "bf16", "kind": "lora", "virtual_tokens": 0, "names": ["q_proj", "v_proj"],
    "tables": b"\x01" + struct.pack("<BHd", 0, 8, 2.0), "blocks": b"\0\0\0\0",
}  # fmt: skip


def table(*sites):
    return bytes([len(sites)]) + b"".join(struct.pack("<BHd", *site) for site in sites)


def test_the_manifest_that_the_bad_ones_differ_from_is_good():
    assert decode_manifest(msgpack.packb(FIELDS), LIMITS).blocks == ((Q,), (Q,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revision": ""}, "revision is ''"),
        ({"revision": "r" * 129}, "revision is str of 129"),
        ({"dtype": "fp16"}, "one of bf16, fp32 is allowed"),
        ({"kind": "dora"}, "one of lora, prefix is allowed"),
        ({"virtual_tokens": 1}, "kind 'lora' with 1 virtual tokens"),
        ({"kind": "prefix"}, "kind 'prefix' with 0 virtual tokens"),
        ({"kind": "prefix", "virtual_tokens": 4}, "kind 'prefix' with 4 virtual tokens and 2 sites"),
        ({"virtual_tokens": 2049}, "virtual_tokens is 2049"),
        ({"names": ["q.proj", "v_proj"]}, "site is 'q.proj'"),
        ({"names": ["../x", "v_proj"]}, "site is '../x'"),
        ({"names": [7]}, "site is 7"),
        ({"names": []}, "name 0 of 0"),
        ({"names": ["a"] * 65}, "65 exceeds max_array_len(64)"),
        ({"tables": "text"}, "tables of a manifest is a str"),
        ({"tables": table((0, 0, 1.0))}, "rank 0 at 'q_proj', 1..64 is allowed"),
        ({"tables": table((0, 65, 1.0))}, "rank 65 at 'q_proj', 1..64 is allowed"),
        ({"tables": table((0, 8, float("nan")))}, "scale nan at 'q_proj'"),
        ({"tables": table((0, 8, float("inf")))}, "scale inf at 'q_proj'"),
        ({"tables": table((0, 8, 1.1e4))}, "a number up to 10000 is allowed"),
        ({"tables": table((0, 8, 1.0), (0, 4, 1.0))}, "stands twice"),
        ({"tables": table(*[(0, 8, 1.0)] * 17)}, "17 sites in a block, 16 are allowed"),
        ({"tables": table((0, 8, 1.0))[:-1]}, "ends before its last one"),
        ({"tables": b""}, "table 0 of 0"),
        ({"blocks": b""}, "0 bytes for the blocks"),
        ({"blocks": b"\0"}, "1 bytes for the blocks"),
        ({"blocks": b"\1\0"}, "a block has table 1 of 1"),
        ({"blocks": b"\0\0" * 4097}, "8194 bytes for the blocks"),
        ({"names": b"\0" * 70_000}, "bytes, 65536 are allowed"),
    ],
)
def test_a_bad_manifest_is_refused_by_its_field(changes, message):
    with pytest.raises(MessageError) as error:
        decode_manifest(msgpack.packb(FIELDS | changes), LIMITS)
    assert message in str(error.value)


@given(data=st.binary(max_size=200))
def test_bytes_of_all_kinds_are_a_manifest_or_a_message_error(data):
    with suppress(MessageError):
        decode_manifest(data, LIMITS)


@given(at=st.integers(0, 400), value=st.integers(0, 255))
def test_a_manifest_with_one_byte_changed_is_another_one_or_an_error(at, value):
    packed = bytearray(encode_manifest(MANIFEST))
    packed[at % len(packed)] = value
    try:
        found = decode_manifest(packed, LIMITS)
    except MessageError:
        return
    assert decode_manifest(encode_manifest(found), LIMITS) == found


def test_content_has_the_id_and_digests_of_its_blobs():
    content = AdapterContent(MANIFEST, tuple(bytes([block]) for block in range(4)))
    assert list(content.digests) == DIGESTS
    assert content.id == adapter_id(MANIFEST, DIGESTS)
    assert content.nbytes == 4
