"""How far two peers are from each other, where they said so and where they did not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.chains.distances import CLIENT, Distances
from routing.names import peer_id_of
from routing.view.records import Record

PEERS = sorted(peer_id_of(bytes([number]) * 32) for number in range(12))
A, B, C, D = PEERS[:4]


def known(rtts, client_rtt=None, default=0.1):
    """The distances that these peers announce: {peer: {other: seconds}}."""
    distances = Distances(default)
    distances.update([Record(peer=peer, rtt=rtt) for peer, rtt in rtts.items()], client_rtt)
    return distances


def test_what_one_of_two_announced_holds_both_ways():
    distances = known({A: {B: 0.3}, B: {}})
    assert distances.between(A, B) == distances.between(B, A) == 0.3


def test_of_two_announcements_the_longer_one_counts():
    assert known({A: {B: 0.2}, B: {A: 0.0}}).between(A, B) == 0.2


def test_nothing_known_is_the_default():
    distances = known({A: {}, B: {C: 0.001}})
    assert distances.between(A, B) == distances.between(B, C) == distances.between(D, A) == 0.1


def test_the_estimate_is_the_shortest_way_over_one_whom_both_know():
    distances = known({A: {C: 0.02, D: 0.001}, B: {C: 0.03}, C: {}, D: {B: 0.003}})
    assert distances.between(A, B) == pytest.approx(0.004)


def test_what_was_announced_is_not_estimated():
    assert known({A: {B: 0.05, C: 0.001}, B: {C: 0.001}, C: {}}).between(A, B) == 0.05


def test_what_is_known_to_be_far_is_farther_than_the_default():
    assert known({A: {C: 0.02}, B: {C: 0.19}, C: {}}).between(A, B) == pytest.approx(0.21)


def test_two_peers_near_the_client_are_near_each_other():
    distances = known({A: {}, B: {}, C: {}}, {A: 0.001, B: 0.002})
    assert distances.between(A, B) == pytest.approx(0.003)
    assert distances.between(A, C) == 0.1


def test_a_peer_that_the_client_has_not_measured_is_estimated_too():
    assert known({A: {B: 0.001}, B: {}}, {A: 0.01}).between(CLIENT, B) == pytest.approx(0.011)


def test_a_replica_beside_well_measured_peers_is_as_near_as_they_are():
    fresh = PEERS[3]
    distances = known({A: {B: 0.0004}, B: {A: 0.0005}, C: {A: 0.0004, B: 0.0004}, fresh: {C: 0.0004}})
    assert distances.between(A, fresh) < 0.001


VIEWS = st.dictionaries(
    st.sampled_from(PEERS),
    st.dictionaries(st.sampled_from(PEERS), st.sampled_from([0.001, 0.01, 0.03, 0.2]), max_size=5),
)
CLIENTS = st.dictionaries(st.sampled_from(PEERS), st.sampled_from([0.001, 0.05]), max_size=3)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(VIEWS, CLIENTS, st.sets(st.sampled_from(PEERS))), min_size=1, max_size=6))
def test_what_was_known_before_makes_no_difference(views):
    kept, records = Distances(), {}
    for rtts, client_rtt, gone in views:
        records = {peer: record for peer, record in records.items() if peer not in gone}
        records |= {peer: Record(peer=peer, rtt=rtt) for peer, rtt in rtts.items()}
        kept.update(list(records.values()), client_rtt)
        anew = Distances()
        anew.update(sorted(records.values(), key=lambda record: record.peer), client_rtt)
        for one in (*PEERS, CLIENT):
            for other in (*PEERS, CLIENT):
                assert kept.between(one, other) == anew.between(one, other)


def test_only_its_relays_lead_to_a_peer_behind_one():
    near, relay, home, other = (peer_id_of(bytes([n]) * 32) for n in (41, 42, 43, 44))
    records = [
        Record(
            peer=near, rtt={home: 0.001, other: 0.001}
        ),  # its own connection to the peer is of no use to others
        Record(peer=relay, rtt={home: 0.02, other: 0.03}),
        Record(peer=home, reach="relayed", relays=(relay,)),
        Record(peer=other),
    ]
    distances = Distances()
    distances.update(records, {near: 0.001, relay: 0.05})
    assert distances.between(CLIENT, home) == pytest.approx(0.07)
    assert distances.between(other, home) == pytest.approx(0.05)
    assert distances.between(near, home) == pytest.approx(0.001)
    records[2] = Record(peer=home)  # reachable after all
    distances.update(records, {near: 0.001, relay: 0.05})
    assert distances.between(CLIENT, home) == pytest.approx(0.002)
    records[2] = Record(peer=home, reach="relayed", relays=(peer_id_of(bytes([45]) * 32),))
    distances.update(records, {near: 0.001, relay: 0.05})
    assert distances.between(CLIENT, home) == 0.1  # over a peer of which nothing is known


def test_between_two_relayed_peers_either_end_s_relay_may_lead():
    one, two, relay, further = (peer_id_of(bytes([n]) * 32) for n in (51, 52, 53, 54))
    records = [
        Record(peer=one, reach="relayed", relays=(relay,)),
        Record(peer=two, reach="relayed", relays=(further,)),
        Record(peer=relay, rtt={one: 0.01, two: 0.02}),
        Record(peer=further, rtt={one: 0.2, two: 0.2}),
    ]
    for order in (records, records[::-1]):
        distances = Distances()
        distances.update(order)
        assert distances.between(one, two) == pytest.approx(0.03)
