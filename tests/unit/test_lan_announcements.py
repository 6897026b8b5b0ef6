"""What nodes say by multicast, and what is believed of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.network.lan.announcement import (
    MAX_ADDRESSES,
    LanPeer,
    interfaces_of,
    read_announcement,
    write_announcement,
)
from tensor_codec.limits import Limits
from tests.fakes import ALICE, BOB

LIMITS = Limits()
HOME = "/ip4/192.168.1.11/tcp/31330"
PRIVATE_SWARM = "0123456789abcdef0123456789abcdef"


def txt(*strings: str | bytes) -> bytes:
    raw = [each if isinstance(each, bytes) else each.encode() for each in strings]
    return b"".join(bytes([len(each)]) + each for each in raw)


def dnsaddr(address: str = HOME, peer: str = BOB.peer_id) -> str:
    return f"dnsaddr={address}/p2p/{peer}"


def read(text: bytes, swarm: str = "public") -> LanPeer | None:
    return read_announcement(text, swarm, LIMITS)


@pytest.mark.parametrize("swarm", ["public", PRIVATE_SWARM])
def test_an_announcement_reads_as_it_was_written(swarm: str):
    listening = [HOME, "/ip6/2001:db8::7/tcp/31330"]
    text = write_announcement(BOB.peer_id, swarm, listening)
    assert read(text, swarm) == LanPeer(BOB.peer_id, tuple(listening))
    assert len(text) <= 500


def test_an_announcement_is_libp2p_s_with_the_swarm_besides():
    assert write_announcement(BOB.peer_id, "public", [HOME]) == txt("raceme=public", dnsaddr())


def test_another_swarm_s_announcement_leads_to_nobody():
    text = write_announcement(BOB.peer_id, PRIVATE_SWARM, [HOME])
    assert read(text) is None
    assert read(txt(dnsaddr())) is None  # another program of libp2p
    assert read(txt("raceme=publi", dnsaddr())) is None
    assert read(txt("raceme=public2", dnsaddr())) is None


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/127.0.0.1/tcp/22",
        "/ip6/::1/tcp/22",
        "/ip4/0.0.0.0/tcp/31330",
        "/ip4/224.0.0.251/tcp/5353",
        "/ip4/192.168.1.11/tcp/0",
        "/ip6/fe80::1/tcp/31330",
        "/dns4/router.example.org/tcp/80",
        "/ip4/192.168.1.11/udp/31330/quic-v1",
        "/ip4/192.168.1.11/tcp/31330/ws",
        "nonsense",
        "/ip4/192.168.1.11/tcp/3133\u0664",
    ],
)
def test_an_address_that_leads_to_no_other_machine_is_left_out(address: str):
    assert read(txt("raceme=public", dnsaddr(address))) is None
    both = txt("raceme=public", dnsaddr(address), dnsaddr())
    assert read(both) == LanPeer(BOB.peer_id, (HOME,))


def test_a_peer_without_an_id_or_with_two_is_nobody():
    assert read(txt("raceme=public", f"dnsaddr={HOME}")) is None
    assert read(txt("raceme=public", dnsaddr(), dnsaddr(peer=ALICE.peer_id))) is None
    assert read(txt("raceme=public", dnsaddr(peer="12D3KooWnonsense"))) is None


def test_of_many_addresses_a_few_count():
    many = [f"/ip4/192.168.1.{number}/tcp/1" for number in range(1, 12)]
    found = read(txt("raceme=public", *map(dnsaddr, many)))
    assert found is not None
    assert found.addresses == tuple(many[:MAX_ADDRESSES])
    assert read(write_announcement(BOB.peer_id, "public", many)) == found


def test_an_announcement_beyond_max_lan_announcement_bytes_is_not_read():
    padding = LIMITS.max_lan_announcement_bytes - len(txt("raceme=public", dnsaddr()))
    strings = [b"x" * 200] * (padding // 201)
    strings.append(b"x" * (padding % 201 - 1))
    whole = txt("raceme=public", dnsaddr(), *strings)
    assert len(whole) == LIMITS.max_lan_announcement_bytes
    assert read(whole) is not None
    assert read(whole + b"\0") is None


@given(st.binary(max_size=1400))
def test_any_bytes_are_an_announcement_or_nothing(text: bytes):
    assert read(text) is None
    read(txt("raceme=public", dnsaddr()) + text)


def test_a_node_of_loopback_alone_or_of_a_public_address_is_not_announced_anywhere():
    assert interfaces_of(["/ip4/203.0.113.7/tcp/1"]) == ()
    assert interfaces_of(["/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/1"]) == ()
    assert interfaces_of([HOME, "/ip6/2001:db8::7/tcp/1", "/ip4/10.0.0.2/tcp/1"]) == (
        "192.168.1.11",
        "10.0.0.2",
    )
    assert write_announcement(BOB.peer_id, "public", ["/ip4/127.0.0.1/tcp/1"]) == txt("raceme=public")
