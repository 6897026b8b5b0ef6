"""Shares of networks, addresses and peers, and the rates of their arrival."""

from __future__ import annotations

import pytest

from node.network.admission.rates import MAX_NAMES, Arrivals, NamedRates
from node.network.admission.shares import Rank, Shares
from node.network.admission.streams import User, gives_way
from tensor_codec.limits import Limits

LIMITS = Limits()
PUBLIC, NEIGHBOUR, OTHER, LOCAL = "8.8.8.8/32", "8.8.8.9/32", "9.9.9.9/32", "127.0.0.1/32"


def test_a_network_counts_before_an_address_and_an_address_before_a_peer():
    shares = Shares([(PUBLIC, "a"), (PUBLIC, "b"), (NEIGHBOUR, "c"), (OTHER, "d"), (OTHER, "d")])
    assert shares.rank(PUBLIC, "a") == Rank(3, 2, 1)
    assert shares.rank(NEIGHBOUR, "c") == Rank(3, 1, 1)
    assert shares.rank(OTHER, "d") == Rank(2, 2, 2)
    assert shares.rank(LOCAL, "e") == Rank(0, 0, 0)


# --- rates ---


def test_a_rate_allows_its_burst_and_then_its_rate():
    rates = NamedRates(2.0, 3)

    def comes(name: str, now: float) -> bool:
        if not rates.has(name, now):
            return False
        rates.take(name, now)
        return True

    assert [comes("a", 0.0) for _ in range(4)] == [True, True, True, False]
    assert comes("b", 0.0)
    assert [comes("a", now) for now in (0.4, 0.5, 0.9, 1.0)] == [False, True, False, True]
    assert [comes("a", 100.0) for _ in range(4)] == [True, True, True, False]


def test_made_up_names_fill_no_memory_and_free_nobody_who_comes_often():
    rates = NamedRates(1.0, 16)
    for _ in range(16):
        rates.take("often", 0.0)
    for number in range(3 * MAX_NAMES):
        rates.take(str(number), 0.0)
        assert len(rates) <= MAX_NAMES
    assert not rates.has("often", 0.0)


def sockets(
    arrivals: Arrivals, prefix: str, now: float, *, scarce: bool = False, suspect: bool = False
) -> int:
    """The number that are accepted of a thousand."""
    return sum(arrivals.socket(prefix, now, scarce=scarce, suspect=suspect) for _ in range(1000))


@pytest.mark.parametrize("prefix", [PUBLIC, LOCAL])
def test_where_places_are_plenty_only_a_flood_is_turned_away(prefix: str):
    arrivals = Arrivals(LIMITS)
    assert sockets(arrivals, prefix, 0.0) == LIMITS.sockets_per_prefix_burst == 128
    assert sockets(arrivals, prefix, 1.0) == LIMITS.sockets_per_prefix_per_second == 20


def test_where_places_are_scarce_a_public_address_brings_one_a_second_and_loopback_as_many_as_before():
    arrivals = Arrivals(LIMITS)
    assert sockets(arrivals, PUBLIC, 0.0, scarce=True) == LIMITS.scarce_connections_burst == 16
    assert sockets(arrivals, PUBLIC, 3.0, scarce=True) == 3
    assert sockets(arrivals, NEIGHBOUR, 3.0, scarce=True) == 16
    assert sockets(arrivals, LOCAL, 3.0, scarce=True) == 128


def test_a_suspect_address_brings_two_and_then_one_in_eight_seconds():
    arrivals = Arrivals(LIMITS)
    assert sockets(arrivals, PUBLIC, 0.0, suspect=True) == 2
    assert sockets(arrivals, PUBLIC, 7.9, suspect=True) == 0
    assert sockets(arrivals, PUBLIC, 8.0, suspect=True) == 1
    assert sockets(arrivals, LOCAL, 0.0, suspect=True) == 128


def test_a_network_of_many_addresses_has_the_rate_of_four():
    arrivals = Arrivals(LIMITS)
    addresses = [f"2606:4700:0:{number:x}::/64" for number in range(200)]
    came = sum(arrivals.socket(prefix, 0.0, scarce=True, suspect=False) for prefix in addresses)
    assert came == 4 * LIMITS.scarce_connections_burst


def test_handshakes_wait_for_their_rate():
    arrivals = Arrivals(LIMITS)

    def begun(prefix: str, now: float) -> int:
        return sum(arrivals.handshake(prefix, now) for _ in range(1000))

    assert begun(PUBLIC, 0.0) == LIMITS.handshakes_per_prefix_burst == 6
    assert begun(PUBLIC, 1.0) == LIMITS.handshakes_per_prefix_per_second == 4
    assert begun(LOCAL, 0.0) == 30  # a swarm may start on one machine
    assert begun(LOCAL, 1.0) == 20


# --- streams ---


@pytest.mark.parametrize("prefix", [PUBLIC, LOCAL])
def test_the_peers_of_an_address_open_streams_at_one_rate_and_each_a_few_of_its_own(prefix: str):
    arrivals = Arrivals(LIMITS)

    def opened(peers: list[str], now: float, prefix: str = prefix) -> int:
        return sum(arrivals.stream(peer, prefix, now) for peer in peers for _ in range(1000))

    crowd = [f"p{number}" for number in range(10)]
    own, together = LIMITS.streams_per_peer_burst, LIMITS.streams_per_prefix_burst
    assert opened(crowd, 0.0) == 10 * own + together
    assert opened(["newcomer"], 0.0) == own, "whatever the others have opened"
    assert opened(["elsewhere"], 0.0, OTHER) == own + together
    seconds = 2.0
    assert opened(crowd, seconds) == seconds * (
        10 * LIMITS.streams_per_peer_per_second + LIMITS.streams_per_prefix_per_second
    )


def test_a_peer_without_an_address_has_no_rate_to_share():
    arrivals = Arrivals(LIMITS)
    assert all(arrivals.stream("p", "", 0.0) for _ in range(2000))


def test_the_peer_with_most_streams_of_the_address_with_most_gives_way():
    users = [User("a", LOCAL, 80), User("b", LOCAL, 70), User("c", PUBLIC, 60), User("d", OTHER, 2)]
    loser = gives_way(User("d", OTHER, 2), users)
    assert loser == users[0]
    assert gives_way(User("b", LOCAL, 70), users) == users[0]
    assert gives_way(User("a", LOCAL, 80), users) is None, "nobody has a larger share"


def test_on_one_address_peers_share_by_id():
    users = [User(name, LOCAL, 80) for name in "abcdef"]
    loser = gives_way(User("new", LOCAL, 0), users)
    assert loser is not None
    assert loser.streams == 80


def test_a_peer_known_good_gives_way_only_where_no_other_has_a_larger_share():
    gateway, others = (
        User("gateway", PUBLIC, 80, good=True),
        [User(str(n), f"9.9.{n}.9/32", 62) for n in range(7)],
    )
    loser = gives_way(User("new", OTHER, 0), [gateway, *others])
    assert loser in others
    assert gives_way(User("new", OTHER, 0), [gateway]) == gateway


def test_a_peer_without_a_stream_gives_none_up():
    users = [User("idle", PUBLIC, 0), User("gateway", PUBLIC, 80, good=True)]
    assert gives_way(User("new", OTHER, 0), users) == users[1]
