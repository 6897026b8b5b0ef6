"""The connections of each address at a gateway."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from client.gateway.door.addresses import REFUSED_AT_ONCE, Addresses

ADDRESSES = [
    "203.0.113.5",
    "::ffff:203.0.113.5",
    "203.0.113.6",
    "2001:db8::1",
    "2001:db8::2",
    "2001:db8:1::1",
]


def test_an_address_gets_its_connections_a_few_refusals_and_then_closed_ones():
    addresses = Addresses(3)
    found = [addresses.came("203.0.113.5") for _ in range(3 + REFUSED_AT_ONCE + 2)]
    assert found == ["taken"] * 3 + ["refused"] * REFUSED_AT_ONCE + ["closed"] * 2
    assert addresses.came("203.0.113.6") == "taken"


def test_the_loopback_and_sockets_without_an_address_have_no_bound():
    addresses = Addresses(1)
    for address in ("127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1", None):
        assert [addresses.came(address) for _ in range(3)] == ["taken"] * 3
        addresses.left(address)
    assert not len(addresses)


def test_an_ipv6_network_and_a_mapped_address_count_together():
    addresses = Addresses(1)
    assert addresses.came("2001:db8::1") == "taken"
    assert addresses.came("2001:db8::ffff:2%eth0") == "refused"
    assert addresses.came("2001:db8:0:1::1") == "taken"
    assert addresses.came("203.0.113.5") == "taken"
    assert addresses.came("::ffff:203.0.113.5") == "refused"


@given(st.lists(st.sampled_from(ADDRESSES), max_size=60), st.randoms(use_true_random=False))
def test_after_as_many_ends_as_beginnings_nothing_is_kept(came, random):
    addresses = Addresses(2)
    for address in came:
        addresses.came(address)
    random.shuffle(came)
    for address in came:
        addresses.left(address)
    assert not len(addresses)
    assert addresses.came(ADDRESSES[0]) == "taken"
