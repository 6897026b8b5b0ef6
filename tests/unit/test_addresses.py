import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.network.addresses import Address, parse_address
from tests.fakes import ALICE


@pytest.mark.parametrize(
    "text",
    [
        "/ip4/127.0.0.1/tcp/0",
        "/ip4/203.0.113.7/tcp/65535",
        "/ip6/::1/tcp/4001",
        "/ip6/2001:db8::7/tcp/4001",
        "/dns/node.example.org/tcp/4001",
        "/dns4/a-b.example/tcp/1",
        "/dns6/localhost/tcp/1",
    ],
)
def test_an_address_reads_and_writes_the_same(text):
    assert str(parse_address(text)) == text
    with_peer = parse_address(f"{text}/p2p/{ALICE.peer_id}")
    assert with_peer.peer == ALICE.peer_id
    assert str(with_peer) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not a TCP multiaddr such as /ip4/127.0.0.1/tcp/4001"),
        ("127.0.0.1:4001", "is not a TCP multiaddr"),
        ("/ip4/127.0.0.1/udp/4001", "is not a TCP multiaddr"),
        ("/ip4/127.0.0.1/udp/4001/quic-v1", "is not a TCP multiaddr"),
        ("/ip4/127.0.0.1/tcp/4001/ws", "is not a TCP multiaddr"),
        ("/ip4/127.0.0.1/tcp/65536", "port '65536', allowed are 0 to 65535"),
        ("/ip4/127.0.0.1/tcp/-1", "port '-1'"),
        ("/ip4/127.0.0.1/tcp/²", "port '²'"),
        ("/ip4/127.0.0.256/tcp/1", "'127.0.0.256' is not an ip4 address"),
        ("/ip4/::1/tcp/1", "is not an ip4 address"),
        ("/ip6/127.0.0.1/tcp/1", "is not an ip6 address"),
        ("/unix/socket/tcp/1", "begins with /unix, known are /ip4, /ip6, /dns, /dns4, /dns6"),
        ("/dns/-bad.example/tcp/1", "is not a host name"),
        ("/dns/a b/tcp/1", "is not a host name"),
        ("/ip4/127.0.0.1/tcp/1/p2p/nonsense", "nonsense"),
        ("/ip4/127.0.0.1/tcp/1" * 100, "a multiaddr of 2000 characters"),
    ],
)
def test_a_bad_address_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_address(text)


@given(st.text(max_size=80) | st.from_regex(r"/(ip4|ip6|dns)/[^/]{1,20}/tcp/[0-9]{1,6}(/p2p/[^/]*)?"))
def test_any_text_is_an_address_or_a_value_error(text):
    try:
        address = parse_address(text)
    except ValueError:
        return
    assert parse_address(str(address)) == Address(address.kind, address.host, address.port)


def test_wildcards_and_loopback_are_told_apart():
    assert parse_address("/ip4/0.0.0.0/tcp/1").is_wildcard
    assert parse_address("/ip6/::/tcp/1").is_wildcard
    assert parse_address("/ip6/::1/tcp/1").is_loopback
    assert not parse_address("/dns/localhost/tcp/1").is_loopback
