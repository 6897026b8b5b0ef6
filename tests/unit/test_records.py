"""Records: only what its peer signed, for this swarm, with values in range, is ever believed."""

import math
import random
from dataclasses import replace

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.names import PeerId, peer_id_of, public_key_of
from routing.view.records import (
    DOMAIN,
    MAX_RTTS,
    MAX_SEQ,
    Record,
    RecordError,
    check_address,
    fit_record,
    sign_record,
    signer,
    verify_record,
)
from tensor_codec.blocks import MAX_BLOCKS
from tensor_codec.limits import Limits

LIMITS = Limits()
KEY = bytes(range(32))
PUBLIC = Ed25519PrivateKey.from_private_bytes(KEY).public_key().public_bytes_raw()
PEER = peer_id_of(PUBLIC)

GOOD = Record(
    peer=PEER,
    addresses=("/ip4/192.0.2.7/tcp/4001", "/ip6/2001:db8::7/tcp/4001", "/dns4/node.example/tcp/65535"),
    swarm="public",
    role="serve",
    model="example/model-1b",
    revision="a" * 64,
    blocks=30,
    start=10,
    stop=20,
    state="online",
    dtype="float32",
    quantize="none",
    adapters=("german",),
    seconds_per_block=0.0012,
    prefill_seconds_per_token=0.00011,
    cache_tokens=8192,
    queue=3,
    rtt={peer_id_of(bytes([i]) * 32): 0.001 * i for i in range(1, 4)},
    seq=1_790_000_000_000_000,
    ttl_seconds=90.0,
    name="Ada's laptop, 2. Stock",
    version="0.1.0",
)


def verify(wire: bytes) -> Record:
    return verify_record(wire, swarm="public", limits=LIMITS)


def payload_of(record: Record) -> dict:
    return msgpack.unpackb(msgpack.unpackb(sign_record(record, KEY))[0])


def signed(payload: object, *, key: bytes = KEY, domain: bytes = DOMAIN) -> bytes:
    """Any payload, properly signed: what a hostile peer can make of its own record."""
    private = Ed25519PrivateKey.from_private_bytes(key)
    body = payload if isinstance(payload, bytes) else msgpack.packb(payload)
    return msgpack.packb([body, private.public_key().public_bytes_raw(), private.sign(domain + body)])


WIRE = sign_record(GOOD, KEY)


def test_a_signed_record_is_read_back_as_it_was():
    assert verify(WIRE) == GOOD
    assert len(WIRE) <= LIMITS.max_record_bytes
    assert peer_id_of(signer(WIRE)) == PEER


def test_codecs_are_read_back_and_left_out_where_there_are_none():
    assert "codecs" not in payload_of(GOOD)
    several = replace(GOOD, codecs=("int8o", "later"))
    assert verify(sign_record(several, KEY)) == several


def test_every_flipped_bit_is_refused():
    for bit in range(len(WIRE) * 8):
        wire = bytearray(WIRE)
        wire[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RecordError):
            verify(bytes(wire))


def test_every_truncation_and_anything_appended_is_refused():
    for end in range(len(WIRE)):
        with pytest.raises(RecordError):
            verify(WIRE[:end])
    with pytest.raises(RecordError):
        verify(WIRE + b"\x00")


@given(st.binary(max_size=1100))
def test_any_bytes_raise_nothing_but_a_record_error(data):
    with pytest.raises(RecordError):
        verify(data)


@settings(max_examples=300)
@given(st.binary(max_size=400))
def test_a_signed_payload_of_any_bytes_raises_nothing_but_a_record_error(data):
    with pytest.raises(RecordError):
        verify(signed(data))


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=500)
@given(st.sampled_from(sorted(payload_of(GOOD))), json_like)
def test_any_value_in_any_field_gives_a_valid_record_or_a_record_error(key, value):
    try:
        record = verify(signed(payload_of(GOOD) | {key: value}))
    except RecordError:
        return
    assert verify(sign_record(record, KEY)) == record  # whatever was let in, we would say ourselves


WRONG = [
    ("blocks", 0),
    ("blocks", MAX_BLOCKS + 1),
    ("blocks", True),
    ("blocks", 30.0),
    ("blocks", 19),  # stop is 20
    ("start", -1),
    ("start", 20),
    ("stop", 10),
    ("stop", 31),
    ("stop", True),
    ("seq", -1),
    ("seq", MAX_SEQ + 1),
    ("ttl_seconds", 0.5),
    ("ttl_seconds", 3601.0),
    ("ttl_seconds", math.nan),
    ("seconds_per_block", 0.0),
    ("seconds_per_block", -0.1),
    ("seconds_per_block", math.inf),
    ("seconds_per_block", 1e-9),
    ("seconds_per_block", 61.0),
    ("prefill_seconds_per_token", 0.0),
    ("prefill_seconds_per_token", math.nan),
    ("cache_tokens", -1),
    ("queue", -1),
    ("queue", "3"),
    ("role", "king"),
    ("state", "dead"),
    ("role", "client"),  # a client holds no blocks
    ("model", ""),
    ("model", "m" * 129),
    ("revision", ""),
    ("dtype", "d" * 17),
    ("name", "n" * 65),
    ("name", "two\nlines"),
    ("name", "right-to-left \u202e override"),
    ("name", 7),
    ("version", None),
    ("adapters", ["x"] * 9),
    ("adapters", [""]),
    ("adapters", "german"),
    ("addresses", ["/ip4/192.0.2.7/tcp/4001"] * 9),
    ("addresses", ["/ip4/192.0.2.7/udp/4001"]),
    ("addresses", ["/ip4/192.0.2.7/tcp/4001/p2p/" + PEER]),
    ("addresses", [b"/ip4/192.0.2.7/tcp/4001"]),
    ("rtt", [[bytes(32), 0.1]] * 2),
    ("rtt", [[bytes([i]) * 32, 0.1] for i in range(MAX_RTTS + 1)]),
    ("rtt", [[bytes(31), 0.1]]),
    ("rtt", [[bytes(32), -0.1]]),
    ("rtt", [[bytes(32), math.nan]]),
    ("rtt", [[bytes(32), 61.0]]),
    ("rtt", [[bytes(32), 1]]),
    ("rtt", [[bytes(32)]]),
    ("rtt", {"a": 0.1}),
    ("swarm", "another"),
    ("swarm", ""),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=[f"{k}={str(v)[:30]}" for k, v in WRONG])
def test_a_value_out_of_range_is_refused(key, value):
    fields = payload_of(replace(GOOD, rtt={}))
    assert verify(signed(fields))
    with pytest.raises(RecordError):
        verify(signed(fields | {key: value}))


@pytest.mark.parametrize("key", sorted(payload_of(GOOD)))
def test_a_missing_field_is_refused(key):
    fields = payload_of(GOOD)
    del fields[key]
    with pytest.raises(RecordError):
        verify(signed(fields))


def test_keys_that_we_do_not_know_are_ignored():
    small = replace(GOOD, rtt={})
    assert verify(signed(payload_of(small) | {"favourite_colour": [1, 2, {"red": None}]})) == small


def test_a_key_that_stands_twice_is_refused():
    fields = list(payload_of(replace(GOOD, rtt={})).items())
    packer = msgpack.Packer()
    body = packer.pack_map_header(len(fields) + 1)
    body += b"".join(packer.pack(key) + packer.pack(value) for key, value in [*fields, ("seq", 2**62)])
    with pytest.raises(RecordError, match="twice"):
        verify(signed(body))


@pytest.mark.parametrize(
    "extension", [msgpack.ExtType(1, b""), msgpack.ExtType(1, b"x"), msgpack.Timestamp(0)]
)
def test_extension_types_are_refused_wherever_they_stand(extension):
    with pytest.raises(RecordError):
        verify(signed(payload_of(GOOD) | {"new": extension}))
    with pytest.raises(RecordError):
        verify(msgpack.packb([extension, PUBLIC, bytes(64)]))


def test_deep_nesting_is_refused():
    with pytest.raises(RecordError):
        verify(signed(b"\x81\xa1x" + b"\x91" * 800 + b"\xc0"))


def test_a_record_over_one_kib_is_refused_before_its_signature_is_looked_at():
    wire = signed(payload_of(GOOD) | {"padding": "x" * 1024})
    with pytest.raises(RecordError, match="at most 1024"):
        verify(wire)


def test_another_peers_key_or_signature_does_not_fit():
    other = Ed25519PrivateKey.from_private_bytes(bytes(32))
    payload, public, signature = msgpack.unpackb(WIRE)
    for parts in (
        [payload, other.public_key().public_bytes_raw(), signature],
        [payload, public, other.sign(DOMAIN + payload)],
    ):
        with pytest.raises(RecordError, match="signature"):
            verify(msgpack.packb(parts))


def test_a_signature_made_for_another_purpose_does_not_count():
    with pytest.raises(RecordError, match="signature"):
        verify(signed(payload_of(GOOD), domain=b""))
    with pytest.raises(RecordError, match="signature"):
        verify(signed(payload_of(GOOD), domain=b"raceme-record-2"))


def test_a_second_encoding_of_a_valid_record_is_refused():
    payload, public, signature = msgpack.unpackb(WIRE)
    size = len(payload).to_bytes(4, "big")
    longer = b"\x93\xc6" + size + payload + msgpack.packb(public) + msgpack.packb(signature)
    with pytest.raises(RecordError):
        verify(longer)
    assert verify(msgpack.packb([payload, public, signature])) == GOOD


def test_a_record_of_another_swarm_is_refused_by_name():
    with pytest.raises(RecordError, match="a record of swarm public, ours is f00d"):
        verify_record(WIRE, swarm="f00d", limits=LIMITS)


def test_we_do_not_sign_for_another_peer():
    with pytest.raises(ValueError, match="cannot be signed"):
        sign_record(replace(GOOD, peer=peer_id_of(bytes(32))), KEY)


def test_we_do_not_sign_what_nobody_would_accept():
    for wrong in ({"stop": 31}, {"seconds_per_block": math.nan}, {"name": "x" * 65}, {"seq": -1}):
        with pytest.raises(ValueError, match="no peer would accept"):
            sign_record(replace(GOOD, **wrong), KEY)


def test_a_joining_peer_need_not_have_measured_yet_but_an_online_one_must():
    joining = replace(GOOD, state="joining", seconds_per_block=0.0, prefill_seconds_per_token=0.0)
    assert verify(sign_record(joining, KEY)) == joining
    with pytest.raises(ValueError, match="seconds_per_block"):
        sign_record(replace(joining, state="online"), KEY)


@pytest.mark.parametrize("role", ["bootstrap", "client"])
def test_a_peer_that_serves_nothing_says_so(role):
    record = Record(peer=PEER, role=role, seq=1, name="directory")
    assert verify(sign_record(record, KEY)) == record


def test_a_record_too_long_keeps_its_nearest_peers():
    rng = random.Random(1)
    rtt = {peer_id_of(rng.randbytes(32)): rng.random() for _ in range(40)}
    fitted = fit_record(replace(GOOD, rtt=rtt), LIMITS)
    assert 0 < len(fitted.rtt) <= MAX_RTTS
    assert sorted(fitted.rtt.values()) == sorted(rtt.values())[: len(fitted.rtt)]
    assert len(sign_record(fitted, KEY)) <= LIMITS.max_record_bytes
    more = sorted(rtt.items(), key=lambda item: item[1])[: len(fitted.rtt) + 1]
    with pytest.raises(ValueError, match="1024"):
        sign_record(replace(GOOD, rtt=dict(more)), KEY)


def test_a_record_too_long_without_any_distance_loses_its_last_addresses():
    addresses = tuple(f"/dns4/{'a' * 50}.{number}.example/tcp/65535" for number in range(12))
    fitted = fit_record(replace(GOOD, addresses=addresses, name="n" * 64), LIMITS)
    assert fitted.addresses == addresses[: len(fitted.addresses)]
    assert 1 <= len(fitted.addresses) < 8
    assert fitted.rtt == {}
    assert len(sign_record(fitted, KEY)) <= LIMITS.max_record_bytes


@pytest.mark.parametrize(
    "text",
    [
        "/dns4/node.example./tcp/4001",
        "/ip4/127.0.0.1/tcp/1",
        "/ip6/::1/tcp/65535",
        "/dns/localhost/tcp/4001",
        "/dns4/a.b-c.example/tcp/80",
        "/dns6/x/tcp/9",
    ],
)
def test_an_address_that_can_be_dialled_is_accepted(text):
    check_address(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/",
        "127.0.0.1:4001",
        "/ip4/127.0.0.1",
        "/ip4/127.0.0.1/tcp/0",
        "/ip4/127.0.0.1/tcp/65536",
        "/ip4/127.0.0.1/tcp/04",
        "/ip4/127.0.0.1/tcp/٤",
        "/ip4/127.0.0.1/tcp/4001/",
        "/ip4/127.0.0.1/tcp/4001/ws",
        "/ip4/127.0.0.256/tcp/4001",
        "/ip4/0.0.0.0/tcp/4001",
        "/ip4/224.0.0.1/tcp/4001",
        "/ip4/::1/tcp/4001",
        "/ip6/127.0.0.1/tcp/4001",
        "/ip6/::/tcp/4001",
        "/ip6/fe80::1%eth0/tcp/4001",
        "/dns/-x/tcp/4001",
        "/dns/a..b/tcp/4001",
        "/dns/a b/tcp/4001",
        "/dns//tcp/4001",
        "/dns/" + "a" * 64 + "/tcp/4001",
        "/dnsaddr/x/tcp/4001",
        "/unix/tmp/tcp/4001",
    ],
)
def test_an_address_that_cannot_be_dialled_is_refused(text):
    with pytest.raises(ValueError, match=r".+"):
        check_address(text)


def test_a_peer_id_holds_its_public_key_and_nothing_else_passes_for_one():
    assert public_key_of(PEER) == PUBLIC
    assert PEER.startswith("12D3KooW")
    for wrong in ("", "0OIl", "Qm" + "a" * 44, PEER[:-1], PEER + "1", "é", "1" * 10_000):
        with pytest.raises(ValueError, match=r".+"):
            public_key_of(PeerId(wrong))
    with pytest.raises(ValueError, match="32 bytes"):
        peer_id_of(bytes(31))


def test_where_a_peer_is_going_is_on_the_wire_only_while_it_moves():
    assert not {"next_start", "next_stop"} & set(payload_of(GOOD))
    moving = replace(GOOD, next_start=12, next_stop=22)
    assert verify(sign_record(moving, KEY)) == moving
    assert moving.moves
    assert not GOOD.moves
    assert list(payload_of(moving)) == sorted(payload_of(moving))


def test_what_a_peer_takes_at_most_is_optional_and_checked():
    assert not {"session_tokens", "step_tokens"} & set(payload_of(GOOD))
    says = replace(GOOD, session_tokens=131_072, step_tokens=2048)
    assert verify(sign_record(says, KEY)) == says
    assert list(payload_of(says)) == sorted(payload_of(says))
    for name in ("session_tokens", "step_tokens"):
        for wrong in (0, -1, 2**40 + 1, 1.0, True, "8192"):
            with pytest.raises(RecordError):
                verify(signed(dict(sorted((payload_of(GOOD) | {name: wrong}).items()))))


def test_the_rank_that_a_peer_takes_is_optional_and_a_whole_number():
    assert "lora" not in payload_of(GOOD)
    says = replace(GOOD, lora=64)
    assert verify(sign_record(says, KEY)) == says
    for wrong in (-1, 1.5, True, "64", 4097):
        with pytest.raises(RecordError):
            verify(signed(dict(sorted((payload_of(GOOD) | {"lora": wrong}).items()))))


def test_four_names_of_adapters_leave_room_for_addresses_and_round_trips():
    names = tuple(f"{number}{'n' * 27}#{'f' * 16}" for number in range(4))
    rtt = {peer_id_of(bytes([i]) * 32): 0.001 * i for i in range(1, 9)}
    fitted = fit_record(replace(GOOD, adapters=names, rtt=rtt, lora=64, prompts=True), LIMITS)
    assert fitted.adapters == names
    assert len(fitted.addresses) == 3
    assert len(fitted.rtt) >= 3


def test_whether_a_peer_takes_prompts_is_optional_and_true_or_false():
    assert "prompts" not in payload_of(GOOD)
    says = replace(GOOD, prompts=True)
    assert verify(sign_record(says, KEY)) == says
    for wrong in (1, "true", 0.0, []):
        with pytest.raises(RecordError):
            verify(signed(dict(sorted((payload_of(GOOD) | {"prompts": wrong}).items()))))


@pytest.mark.parametrize(
    "wrong",
    [
        {"next_start": 12},
        {"next_stop": 22},
        {"next_start": 12, "next_stop": 12},
        {"next_start": -1, "next_stop": 3},
        {"next_start": 12, "next_stop": 31},
        {"next_start": 12.0, "next_stop": 22},
    ],
)
def test_a_peer_can_only_go_to_blocks_that_there_are(wrong):
    payload = payload_of(GOOD) | wrong
    with pytest.raises(RecordError):
        verify(signed(dict(sorted(payload.items()))))


RSA_RELAY = "QmNnooDu7bfjPFoTZYxMNLWUQJyrVwtbZg5gBMjTezGAJN"


def test_how_a_peer_is_reached_is_optional_and_checked():
    relay = peer_id_of(b"r" * 32)
    said = replace(
        GOOD,
        reach="relayed",
        relays=(relay,),
        through=(f"/ip4/198.18.7.1/tcp/1/p2p/{RSA_RELAY}",),
        lan=("/ip4/192.168.1.11/tcp/1",),
        seen="203.0.113.7",
        helps=True,
        relay_mbit=50,
        relayed_bytes=2**40,
        unreached="timed out",
    )
    assert verify(sign_record(said, KEY)) == said
    assert said.every_relay == (relay, RSA_RELAY)
    plain = msgpack.unpackb(msgpack.unpackb(sign_record(GOOD, KEY))[0])
    assert (
        not {"reach", "relays", "lan", "seen", "helps", "relay_mbit", "relayed_bytes", "unreached", "through"}
        & plain.keys()
    )  # as older versions have it
    for wrong in (
        {"reach": "maybe"},
        {"relays": [b"short"]},
        {"relays": [b"r" * 32] * 2},
        {"relays": [bytes([n]) * 32 for n in range(4)]},
        {"lan": ["/ip4/192.168.1.11/tcp/1"] * 3},
        {"lan": ["nonsense"]},
        {"through": ["/ip4/198.18.7.1/tcp/1"]},
        {"through": [f"/ip4/0.0.0.0/tcp/1/p2p/{RSA_RELAY}"]},
        {"through": ["/ip4/198.18.7.1/tcp/1/p2p/0OIl"]},
        {"through": [f"/ip4/198.18.7.{n}/tcp/1/p2p/{RSA_RELAY}" for n in range(3)]},
        {"seen": "nonsense"},
        {"seen": "0.0.0.0"},
        {"helps": 1},
        {"relay_mbit": -1},
        {"relayed_bytes": "many"},
        {"unreached": "a story"},
    ):
        with pytest.raises(RecordError):
            verify(signed(plain | wrong))


def test_a_record_too_long_loses_its_private_addresses_first():
    far = {peer_id_of(bytes([n]) * 32): 0.001 * n for n in range(1, MAX_RTTS + 1)}
    lan = tuple(f"/ip6/fd00:1111:2222:3333:4444:5555:6666:777{n}/tcp/31330" for n in range(2))
    fitted = fit_record(replace(GOOD, rtt=far, lan=lan, seen="203.0.113.7"), LIMITS)
    assert fitted.lan == ()
    assert fitted.seen
    assert len(fitted.rtt) >= len(fit_record(replace(GOOD, rtt=far, seen="203.0.113.7"), LIMITS).rtt)
