"""What records say of relays: whom to ask for a reservation, and through whom a peer is reached."""

from __future__ import annotations

from dataclasses import replace

from node.network.reachability.routes import named_in_record, public_addresses, relay_candidates, routes_to
from node.network.relaying.own_reservations import Candidate
from routing.names import PeerId, peer_id_of
from routing.view.records import Record
from routing.view.view import Arrival, SwarmView, merge

ME, NEAR, FAR, HOME, BOOTSTRAP, STRANGER = (peer_id_of(bytes([number]) * 32) for number in range(6))
RTTS = {NEAR: 0.01, FAR: 0.1}


def public(peer: PeerId, octet: int, **more: object) -> Record:
    record = Record(
        peer=peer,
        addresses=(f"/ip4/198.18.{octet}.1/tcp/4001",),
        role="serve",
        reach="public",
        helps=True,
        seq=1,
    )
    return replace(record, **more)  # type: ignore[arg-type]


def view_of(*records: Record) -> SwarmView:
    return merge(SwarmView("public"), [Arrival(each, b"", 0.0) for each in records], 0.0).view


def home(**more: object) -> Record:
    return public(HOME, 9, addresses=(), helps=False, reach="relayed", relays=(FAR, NEAR), **more)


def test_peers_that_help_are_asked_for_reservations_and_no_others():
    view = view_of(
        public(ME, 1), public(NEAR, 2), public(BOOTSTRAP, 3, role="bootstrap"),
        public(FAR, 4, helps=False), public(STRANGER, 5, addresses=()), home(),
    )  # fmt: skip
    found = {each.peer: each for each in relay_candidates(view, RTTS, ME)}
    assert set(found) == {NEAR, BOOTSTRAP}
    assert found[NEAR].rtt_seconds == 0.01
    assert not found[NEAR].is_bootstrap
    assert found[BOOTSTRAP].rtt_seconds is None
    assert found[BOOTSTRAP].is_bootstrap
    assert found[NEAR].addresses == ("/ip4/198.18.2.1/tcp/4001",)


def test_a_relay_of_the_same_room_serves_where_none_is_on_the_internet():
    room = public(NEAR, 2, addresses=("/ip4/192.168.1.12/tcp/4001",))
    assert [each.peer for each in relay_candidates(view_of(room), RTTS, ME)] == [NEAR]
    assert [each.peer for each in relay_candidates(view_of(room, public(FAR, 4)), RTTS, ME)] == [FAR]


def test_the_shortest_way_to_a_relayed_peer_comes_first():
    view = view_of(public(NEAR, 2), public(FAR, 4), home())
    routes = routes_to(view, RTTS, HOME)
    assert [each.peer for each in routes.relays] == [NEAR, FAR]
    assert routes.at_once
    assert routes.relays[0].addresses == ("/ip4/198.18.2.1/tcp/4001",)
    # the near relay is far from the peer
    view = view_of(public(NEAR, 2), public(FAR, 4), home(rtt={NEAR: 0.3, FAR: 0.001}))
    assert [each.peer for each in routes_to(view, RTTS, HOME).relays] == [FAR, NEAR]


def test_a_relay_without_a_record_stays_a_way_of_last_resort():
    routes = routes_to(view_of(public(NEAR, 2), home()), RTTS, HOME)
    assert [(each.peer, bool(each.addresses)) for each in routes.relays] == [(NEAR, True), (FAR, False)]


RSA = PeerId("QmNnooDu7bfjPFoTZYxMNLWUQJyrVwtbZg5gBMjTezGAJN")
FOREIGN = f"/ip4/198.18.7.1/tcp/4001/p2p/{RSA}"


def test_a_relay_that_is_no_peer_of_the_swarm_is_dialled_where_the_record_says():
    view = view_of(public(NEAR, 2), home(through=(FOREIGN, f"/dns4/r.example/tcp/1/p2p/{NEAR}")))
    routes = routes_to(view, RTTS, HOME)
    assert [each.peer for each in routes.relays] == [NEAR, FAR, RSA]
    assert routes.relays[0].addresses == ("/ip4/198.18.2.1/tcp/4001", "/dns4/r.example/tcp/1")
    assert routes.relays[2].addresses == ("/ip4/198.18.7.1/tcp/4001",)
    only = public(HOME, 9, addresses=(), helps=False, reach="relayed", through=(FOREIGN,))
    assert [each.peer for each in routes_to(view_of(only), RTTS, HOME).relays] == [RSA]
    assert view_of(only).is_dialled(only)


def test_the_operator_s_relays_are_named_by_their_addresses_in_a_public_swarm():
    chosen = [
        Candidate(RSA, ("/ip4/198.18.7.1/tcp/4001",), is_chosen=True),
        Candidate(FAR, (f"/ip4/198.18.4.1/tcp/4001/p2p/{FAR}",), is_chosen=True),
        Candidate(STRANGER, ("/ip4/198.18.5.1/tcp/4001",), is_chosen=True),
    ]
    relays = (NEAR, RSA, FAR)
    through = (FOREIGN, f"/ip4/198.18.4.1/tcp/4001/p2p/{FAR}")
    assert named_in_record(relays, chosen, is_public=True) == ((NEAR, FAR), through)
    assert named_in_record(relays, chosen, is_public=False) == ((NEAR, FAR), ())


def test_a_circuit_waits_for_the_addresses_of_a_peer_that_may_have_some():
    view = view_of(public(NEAR, 2), public(HOME, 9, reach="unknown", relays=(NEAR,)))
    assert not routes_to(view, RTTS, HOME).at_once


def test_peers_without_relays_and_unknown_peers_have_no_routes():
    view = view_of(public(NEAR, 2))
    assert routes_to(view, RTTS, NEAR).relays == () == routes_to(view, RTTS, STRANGER).relays


def test_a_peer_is_dialled_back_where_others_have_reached_it():
    private = "/ip4/192.168.1.2/tcp/4001"
    view = view_of(
        public(NEAR, 2, addresses=("/ip4/198.18.2.1/tcp/4001", private)), public(FAR, 4, reach="unknown")
    )
    assert public_addresses(view, NEAR) == ("/ip4/198.18.2.1/tcp/4001",)
    assert public_addresses(view, FAR) == () == public_addresses(view, STRANGER)
