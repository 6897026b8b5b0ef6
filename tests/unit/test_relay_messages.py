"""Circuit relay v2 and DCUtR on the wire: what is built is read again, and no bytes of a peer raise more."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, StopMessage
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from multiaddr import Multiaddr

from node.network.addresses import parse_address
from node.network.relaying import messages
from node.network.relaying.messages import (
    Connect,
    HopAnswer,
    Punch,
    Reserve,
    Status,
    decode_hop,
    decode_hop_answer,
    decode_observed,
    decode_punch,
    decode_stop,
    decode_stop_status,
    encode_hop_connect,
    encode_hop_status,
    encode_punch,
    encode_reservation,
    encode_reserve,
    encode_stop_connect,
    encode_stop_status,
    read_delimited,
)
from tensor_codec.errors import PeerGone, RemoteProtocolError
from tests.fakes import ALICE, BOB

DECODERS = (decode_hop, decode_hop_answer, decode_stop, decode_stop_status, decode_punch, decode_observed)


def received(data: bytes, most: int = 4096, piece: int = 1 << 20) -> tuple[bytes, bytes]:
    """The first message, and the bytes that were left alone."""
    left = bytearray(data)

    async def receive(size: int) -> bytes:
        taken = bytes(left[: min(size, piece)])
        del left[: len(taken)]
        return taken

    async def read() -> bytes:
        return await read_delimited(receive, most)

    return trio.run(read), bytes(left)


def body(data: bytes) -> bytes:
    message, left = received(data)
    assert not left
    return message


def test_what_is_built_is_read():
    peer = BOB.peer_id
    assert decode_hop(body(encode_reserve())) == Reserve()
    assert decode_hop(body(encode_hop_connect(peer))) == Connect(peer)
    assert decode_stop(body(encode_stop_connect(peer))) == Connect(peer)
    for status in Status:
        assert decode_hop_answer(body(encode_hop_status(status))) == HopAnswer(status)
        assert decode_stop_status(body(encode_stop_status(status))) == status
    addresses = [f"/ip4/198.18.1.1/tcp/4001/p2p/{peer}"]
    assert decode_hop_answer(body(encode_reservation(99, addresses))) == HopAnswer(Status.OK, 99)
    seen = (parse_address("/ip4/198.18.1.1/tcp/1"), parse_address("/ip6/2001:db8::1/tcp/2"))
    for punch in (Punch(False, seen), Punch(is_sync=True)):
        assert decode_punch(body(encode_punch(punch))) == punch


def test_the_bytes_are_those_of_libp2p():
    hop: Any = HopMessage()
    hop.ParseFromString(body(encode_hop_connect(BOB.peer_id)))
    assert (hop.type, ID(hop.peer.id).to_base58()) == (HopMessage.CONNECT, BOB.peer_id)
    stop: Any = StopMessage()
    stop.ParseFromString(body(encode_stop_connect(ALICE.peer_id)))
    assert (stop.type, ID(stop.peer.id).to_base58()) == (StopMessage.CONNECT, ALICE.peer_id)
    hop.ParseFromString(body(encode_reservation(7, ["/ip4/198.18.1.1/tcp/4001"])))
    assert hop.reservation.expire == 7
    assert list(map(str, map(Multiaddr, hop.reservation.addrs))) == ["/ip4/198.18.1.1/tcp/4001"]
    assert not hop.HasField("limit"), "libp2p's word for a circuit without limits"


def test_a_limited_circuit_is_known():
    answer: Any = HopMessage(type=HopMessage.STATUS)
    answer.status = 100
    answer.limit.duration = 0
    assert not decode_hop_answer(answer.SerializeToString()).is_limited
    answer.limit.data = 1 << 17
    assert decode_hop_answer(answer.SerializeToString()).is_limited
    asked = StopMessage(type=StopMessage.CONNECT)
    asked.peer.id = ID.from_base58(BOB.peer_id).to_bytes()
    assert not decode_stop(asked.SerializeToString()).is_limited
    asked.limit.data, asked.limit.duration = 4 << 30, 1800
    assert not decode_stop(asked.SerializeToString()).is_limited, "enough for a session"
    asked.limit.duration = 120
    assert decode_stop(asked.SerializeToString()) == Connect(BOB.peer_id, is_limited=True)


@pytest.mark.parametrize(
    "decode", [decode_hop, decode_hop_answer, decode_stop, decode_stop_status, decode_punch]
)
def test_a_message_without_its_type_is_refused(decode: Any):
    with pytest.raises(RemoteProtocolError):
        decode(b"")


@given(st.binary(max_size=300), st.sampled_from(DECODERS))
def test_no_bytes_raise_anything_but_a_broken_rule(data: bytes, decode: Any):
    with suppress(RemoteProtocolError):
        decode(data)


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_addresses_that_nobody_dials_are_left_out(addresses: list[bytes]):
    usual = Multiaddr("/ip4/198.18.1.1/tcp/1").to_bytes()
    others = [
        Multiaddr(each).to_bytes()
        for each in ("/ip4/0.0.0.0/tcp/1", "/ip4/198.18.1.1/tcp/0", "/ip4/198.18.1.1/udp/1/quic-v1")
    ]
    message = HolePunch(type=HolePunch.CONNECT, ObsAddrs=[usual, *others, *addresses])
    found = decode_punch(message.SerializeToString()).addresses
    assert found[0] == parse_address("/ip4/198.18.1.1/tcp/1")
    assert len(found) <= messages.MAX_ADDRESSES
    assert all(each.kind in ("ip4", "ip6") and each.port and not each.is_wildcard for each in found)


@given(st.binary(max_size=300), st.binary(max_size=20), st.integers(1, 9))
def test_of_a_stream_no_byte_more_than_the_message_is_read(message: bytes, rest: bytes, piece: int):
    assert received(messages.delimited(message) + rest, piece=piece) == (message, rest)


def test_a_message_beyond_the_limit_max_relay_message_bytes_is_not_read():
    assert received(messages.delimited(bytes(4096)))[0] == bytes(4096)
    with pytest.raises(RemoteProtocolError, match="a message of 4097 bytes, at most 4096"):
        received(messages.delimited(bytes(4097)))
    with pytest.raises(RemoteProtocolError, match="more than three bytes"):
        received(b"\xff\xff\xff\xff\x01")
    for cut in (b"", b"\x80", b"\x05abc"):
        with pytest.raises(PeerGone):
            received(cut)


@pytest.mark.parametrize("size", [0, 65, 200])
def test_a_peer_id_has_a_usual_length(size: int):
    message: Any = HopMessage(type=HopMessage.CONNECT)
    message.peer.id = bytes(size)
    with pytest.raises(RemoteProtocolError, match=f"a peer id of {size} bytes"):
        decode_hop(message.SerializeToString())
