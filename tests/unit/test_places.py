"""The places of a full view, the networks of peers, and the new peers that are passed on."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from routing.names import PeerId, peer_id_of
from routing.view.networks import draw, network_of
from routing.view.newcomers import MAX_LANES, Newcomers
from routing.view.records import NOBODY
from routing.view.view import Arrival, SwarmView, expire, merge
from tensor_codec.token_bucket import TokenBucket
from tests.unit.test_view import span

FLOODER, HONEST = PeerId("flooder"), PeerId("honest")


def peer(number: int) -> PeerId:
    return peer_id_of(number.to_bytes(32, "big"))


def told(number: int, source: PeerId = NOBODY, network: str = "8.8.8", seq: int = 1) -> Arrival:
    """A record of a peer, as a neighbour tells of it."""
    record = replace(span(0), peer=peer(number), addresses=(f"/ip4/{network}.9/tcp/4001",), seq=seq)
    return Arrival(record, f"{number} {seq}".encode(), 0.0, source)


def sources(view: SwarmView) -> dict[PeerId, int]:
    found: dict[PeerId, int] = {}
    for entry in view.entries.values():
        found[entry.source] = found.get(entry.source, 0) + 1
    return found


def flooded(most: int, met: tuple[PeerId, ...] = ()) -> SwarmView:
    """A view that one neighbour has filled with made-up peers, each in a network of its own."""
    view = merge(SwarmView("public", most), [told(0), told(1, HONEST)], 0.0, met).view
    flood = [told(1000 + n, FLOODER, f"9.{n // 250}.{n % 250}") for n in range(2 * most)]
    return merge(view, flood, 0.0, met).view


def test_a_full_view_gives_a_new_peer_of_another_neighbour_a_place_of_the_flood():
    view = flooded(50)
    assert sources(view) == {NOBODY: 1, HONEST: 1, FLOODER: 48}
    view, changed = merge(view, [told(2, HONEST), told(3, HONEST)], 1.0)
    assert changed == (peer(2), peer(3))
    assert sources(view) == {NOBODY: 1, HONEST: 3, FLOODER: 46}


def test_a_neighbour_gets_no_more_than_its_share_of_a_full_view():
    view = merge(flooded(50), [told(100 + n, HONEST) for n in range(200)], 1.0).view
    assert len(view.entries) == 50
    assert abs(sources(view)[FLOODER] - sources(view)[HONEST]) <= 1


def test_peers_that_were_met_keep_their_places_and_always_get_one():
    met = tuple(map(peer, range(10)))
    view = merge(SwarmView("public", 10), [told(n) for n in range(9)], 0.0, met).view
    view = merge(view, [told(1000 + n, FLOODER) for n in range(100)], 0.0, met).view
    assert sum(entry.source == FLOODER for entry in view.entries.values()) == 1
    view, changed = merge(view, [told(9, FLOODER)], 1.0, met)
    assert changed == (peer(9),)
    assert set(view.entries) == set(met)
    assert merge(view, [told(11, HONEST)], 2.0, met).changed == ()  # all places are of met peers


def test_in_a_full_view_of_one_neighbour_a_crowded_network_makes_room():
    crowd = [told(1000 + n, FLOODER, "9.9.9") for n in range(20)]
    view = merge(SwarmView("public", 20), crowd, 0.0).view
    view, changed = merge(view, [told(1, FLOODER, "7.7.7"), told(2000, FLOODER, "9.9.9")], 0.0)
    assert changed == (peer(1),)
    assert len(view.entries) == 20


def test_a_view_that_is_not_full_gives_every_peer_of_one_network_a_place():
    crowd = [told(n, HONEST, "9.9.9") for n in range(100)]
    assert len(merge(SwarmView("public", 100), crowd, 0.0).view.entries) == 100


def test_a_renewal_by_another_neighbour_does_not_move_a_peer_to_that_neighbour_s_share():
    view = merge(SwarmView("public", 10), [told(1, HONEST)], 0.0).view
    view = merge(view, [told(1, FLOODER, seq=2)], 1.0).view
    assert sources(view) == {HONEST: 1}


def strangers(count: int, each: int) -> list[Arrival]:
    """Made-up peers, told by as many neighbours that nobody configured."""
    return [
        told(1000 + n, PeerId(f"stranger {n % count}"), f"9.{n // 250}.{n % 250}")
        for n in range(count * each)
    ]


def test_any_number_of_strangers_crowds_out_none_of_the_peers_that_a_bootstrap_peer_told_of():
    honest, flood = [told(n, HONEST) for n in range(50)], strangers(60, 10)
    first = merge(SwarmView("public", 100), [*honest, *flood], 0.0, (), {HONEST}).view
    assert sources(first)[HONEST] == 50
    late = merge(SwarmView("public", 100), [*flood, *honest], 0.0, (), {HONEST}).view
    assert sources(late)[HONEST] == 50
    assert len(late.entries) == 100
    unprotected = merge(SwarmView("public", 100), [*flood, *honest], 0.0).view
    assert sources(unprotected)[HONEST] < 5


def test_bootstrap_peers_have_no_more_than_half_of_a_full_view_for_certain_and_share_it():
    hostile = PeerId("a hostile bootstrap peer")
    flood = strangers(60, 10)
    own = [told(100_000 + n, hostile, f"7.{n // 250}.{n % 250}") for n in range(500)]
    view = merge(SwarmView("public", 100), [*flood, *own], 0.0, (), {HONEST, hostile}).view
    assert sources(view)[hostile] == 50
    view = merge(view, [told(n, HONEST) for n in range(500)], 1.0, (), {HONEST, hostile}).view
    assert abs(sources(view)[hostile] - sources(view)[HONEST]) <= 1
    assert sources(view)[hostile] + sources(view)[HONEST] == 50


def test_a_renewal_by_a_bootstrap_peer_moves_a_peer_to_the_places_that_are_kept():
    view = merge(SwarmView("public", 10), [told(1, FLOODER)], 0.0, (), {HONEST}).view
    view = merge(view, [told(1, HONEST, seq=2)], 1.0, (), {HONEST}).view
    assert sources(view) == {HONEST: 1}
    view = merge(view, [told(1, FLOODER, seq=3)], 2.0, (), {HONEST}).view
    assert sources(view) == {HONEST: 1}


def test_peers_are_drawn_by_network_and_every_network_gives_one_before_any_gives_a_second():
    crowd = {peer(n): ("/ip4/9.9.9.9/tcp/1",) for n in range(100)}
    others = {peer(200 + n): (f"/ip4/7.7.{n}.1/tcp/1",) for n in range(3)}
    at_home = {peer(300 + n): ("/ip4/192.168.1.1/tcp/1",) for n in range(4)}
    drawn = draw(crowd | others | at_home, 8, random.Random(1))
    assert len(set(drawn)) == 8
    assert sum(each in crowd for each in drawn) == 1
    counts = Counter(draw(crowd | others, 1, random.Random(n))[0] in crowd for n in range(400))
    assert 60 <= counts[True] <= 140  # one network of four
    assert sorted(draw(crowd, 500, random.Random(1))) == sorted(crowd)
    assert draw({}, 3, random.Random(1)) == []


def test_a_record_counts_for_its_life_at_most_whatever_its_peer_says():
    view = merge(SwarmView("public"), [Arrival(span(0, ttl_seconds=3600.0), b"w")], 100.0).view
    assert view.next_expiry == 190.0
    assert expire(view, 189.9).records()
    assert not expire(view, 190.0).records()
    old = Arrival(span(1, ttl_seconds=3600.0), b"w", age=90.0)
    assert merge(SwarmView("public"), [old], 100.0).changed == ()


def test_records_of_clients_are_neither_kept_nor_passed_on():
    client = span(0, role="client", model="", revision="", blocks=0, stop=0)
    assert merge(SwarmView("public"), [Arrival(client, b"w")], 0.0).changed == ()


def test_a_record_that_is_withheld_is_sent_to_nobody_that_lacks_it():
    view = merge(SwarmView("public"), [told(1), told(2)], 0.0).view
    assert [each.record.peer for each in view.missing({}, 1.0, None, {peer(1)})] == [peer(2)]


@pytest.mark.parametrize(
    ("addresses", "network"),
    [
        (("/ip4/8.8.4.4/tcp/1",), "8.8.4.0/24"),
        (("/ip4/10.0.0.1/tcp/1", "/ip4/8.8.4.4/tcp/1"), "8.8.4.0/24"),
        (("/ip6/2a00:1450:4001:80b::1/tcp/1",), "2a00:1450:4001::/48"),
        (("/ip6/::ffff:8.8.4.4/tcp/1",), "8.8.4.0/24"),
        (("/ip4/127.0.0.1/tcp/1", "/ip4/192.168.1.1/tcp/1", "/ip6/fd00::1/tcp/1"), ""),
        (("/dns4/example.org/tcp/1",), ""),
        (("/ip4/8.8.4/tcp/1", "nonsense"), ""),
        ((), ""),
    ],
)
def test_a_peer_s_network_is_that_of_its_first_public_address(addresses: tuple[str, ...], network: str):
    assert network_of(addresses) == network


# --- passing new peers on -------------------------------------------------------------------------


def newcomers() -> Newcomers:
    return Newcomers(2.0, 4, random.Random(1))


def nobody(_: PeerId) -> bool:
    return False


def test_a_flood_passes_at_the_rate_of_its_lane_and_leaves_the_other_lanes_alone():
    lanes, flood = newcomers(), [peer(n) for n in range(1000)]
    assert lanes.arrive(flood, "flooder", 0.0) == flood[:4]
    assert lanes.arrive([peer(5000)], "honest", 0.0) == [peer(5000)]
    assert lanes.release(nobody, flood, 0.0) == []
    assert len(lanes.release(nobody, flood, 3.0)) == 4  # no more than the burst, however long it took
    assert len(lanes.release(nobody, flood, 4.0)) == 2
    assert len(lanes.waiting) == 1000 - 4 - 4 - 2


def test_a_peer_that_is_met_while_it_waits_is_passed_on_at_once():
    lanes, flood = newcomers(), [peer(n) for n in range(50)]
    lanes.arrive(flood, "flooder", 0.0)
    assert lanes.release({peer(40)}.__contains__, flood, 0.0) == [peer(40)]
    assert peer(40) not in lanes.waiting


def test_peers_that_the_view_has_lost_wait_no_longer():
    lanes, flood = newcomers(), [peer(n) for n in range(50)]
    lanes.arrive(flood, "flooder", 0.0)
    assert lanes.release(nobody, [], 0.0) == []
    assert not lanes.waiting
    assert lanes.release(nobody, flood, 100.0) == []


def test_a_peer_that_waits_gets_no_second_place():
    lanes, flood = newcomers(), [peer(n) for n in range(10)]
    lanes.arrive(flood, "flooder", 0.0)
    assert lanes.arrive(flood[4:], "another", 0.0) == []
    assert len(lanes.waiting) == 6


def test_the_number_of_lanes_is_bounded_while_none_waits():
    lanes = newcomers()
    for number in range(2 * MAX_LANES):
        lanes.arrive([peer(number)], str(number), 0.0)
    assert len(lanes._lanes) == MAX_LANES


def test_a_token_bucket_gives_its_burst_and_then_its_rate():
    bucket = TokenBucket.full(2.0, 4, 0.0)
    assert [bucket.try_take(1, 0.0) for _ in range(5)] == [True] * 4 + [False]
    assert bucket.try_take(1, 0.5)
    assert not bucket.try_take(1, 0.5)
    assert bucket.take(3, 0.5) == 1.5
    assert bucket.take(0, 100.0) == 0.0
    assert bucket.level == 4
