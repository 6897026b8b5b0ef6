"""The prefixes by which peers are counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.network.prefixes import address_prefix, is_local, network_of, network_prefix, sharer


@pytest.mark.parametrize(
    ("host", "address", "network"),
    [
        ("192.0.2.7", "192.0.2.7/32", "192.0.2.0/24"),
        ("127.0.0.1", "127.0.0.1/32", "127.0.0.0/24"),
        ("::ffff:192.0.2.7", "192.0.2.7/32", "192.0.2.0/24"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64", "2001:db8:1::/48"),
        ("fe80::1%eth0", "fe80::/64", "fe80::/48"),
        ("fe80::1%25/x", "fe80::/64", "fe80::/48"),
        ("::1", "::/64", "::/48"),
        ("a host", "", ""),
        ("", "", ""),
    ],
)
def test_an_address_has_a_prefix_of_its_host_and_one_of_its_network(host: str, address: str, network: str):
    assert address_prefix(host) == address
    assert network_prefix(host) == network
    assert network_of(address) == network


@given(st.ip_addresses(v=6), st.integers(0, 2**64 - 1))
def test_all_addresses_of_one_64_count_as_one(address: object, other: int):
    sibling = (int(address) >> 64 << 64) + other  # type: ignore[call-overload]  # an IPv6Address
    if sibling >> 32 != 0xFFFF and int(address) >> 32 != 0xFFFF:  # type: ignore[call-overload]
        assert address_prefix(str(address)) == address_prefix(_text(sibling))


def _text(number: int) -> str:
    return ":".join(f"{number >> shift & 0xFFFF:x}" for shift in range(112, -1, -16))


@pytest.mark.parametrize(
    ("prefix", "local"),
    [
        ("127.0.0.9/32", True),
        ("::/64", True),
        ("10.1.2.3/32", True),
        ("192.168.1.0/24", True),
        ("169.254.1.2/32", True),
        ("fe80::/64", True),
        ("fd00:1:2:3::/64", True),
        ("", True),
        ("8.8.8.8/32", False),
        ("2606:4700:1:2::/64", False),
    ],
)
def test_loopback_and_private_networks_are_local(prefix: str, local: bool):
    assert is_local(prefix) == local


def test_peers_of_a_public_address_share_and_those_of_a_local_network_do_not():
    assert sharer("peer", "8.8.8.8/32") == "8.8.8.8/32"
    for local in ("127.0.0.1/32", "192.168.1.7/32", ""):
        assert sharer("peer", local) == "peer"
