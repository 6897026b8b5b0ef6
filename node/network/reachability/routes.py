"""Relays as records tell of them: whom to ask for a reservation, through whom to reach a peer; pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from node.network.addresses import Reach, parse_address
from node.network.reachability.candidates import is_public, reach_of_address
from node.network.relaying.circuits import RelayAt, Routes
from node.network.relaying.own_reservations import Candidate
from routing.names import PeerId, public_key_of
from routing.view.view import SwarmView


def relay_candidates(view: SwarmView, rtts: Mapping[PeerId, float], me: PeerId) -> list[Candidate]:
    """The peers that relay for others, as their records say: those on the Internet, if any are.

    rtts: seconds from here to a peer and back, as far as known.
    """
    helpers = [each for each in view.records() if each.helps and each.peer != me]
    return [
        Candidate(record.peer, addresses, rtts.get(record.peer), record.role == "bootstrap")
        for record in list(filter(is_public, helpers)) or helpers
        if (addresses := view.dialled_at(record))
    ]


def routes_to(view: SwarmView, rtts: Mapping[PeerId, float], peer: PeerId) -> Routes:
    """The relays of a peer, the shortest way first: from here to a relay, and from there to the peer."""
    if (record := view.get(peer)) is None or not record.every_relay:
        return Routes()

    def seconds(relay: PeerId) -> float:
        return rtts.get(relay, math.inf) + record.rtt.get(relay, 0.0)

    named: dict[str, list[str]] = {}
    for text in record.through:
        address, _, relay = text.rpartition("/p2p/")
        named.setdefault(relay, []).append(address)
    relays = sorted(record.every_relay, key=seconds)
    found = ((relay, (*_dialled_at(view, relay), *named.get(relay, ()))) for relay in relays)
    return Routes(tuple(RelayAt(r, tuple(dict.fromkeys(at))) for r, at in found), record.reach == "relayed")


def named_in_record(
    relays: Sequence[PeerId], chosen: Sequence[Candidate], *, is_public: bool
) -> tuple[tuple[PeerId, ...], tuple[str, ...]]:
    """How a record names relays: by their keys, and those chosen by the operator by their addresses too.

    Such a relay may be no peer of the swarm, so that no record says where it listens.
    is_public: the swarm has no key.  In others it is a peer of the swarm: it has proved the key.
    """
    at = {each.peer: each.addresses for each in chosen}
    through = [f"{at[relay][0].partition('/p2p/')[0]}/p2p/{relay}" for relay in relays if at.get(relay)]
    return tuple(filter(_has_key, relays)), tuple(through) if is_public else ()


def _has_key(peer: PeerId) -> bool:
    try:
        return bool(public_key_of(peer))
    except ValueError:
        return False  # a relay with an RSA key, which no record can name


def public_addresses(view: SwarmView, peer: PeerId) -> tuple[str, ...]:
    """Where a peer that others have reached can be dialled; none where nobody has."""
    record = view.get(peer)
    if record is None or record.reach != "public":
        return ()
    return tuple(each for each in record.addresses if reach_of_address(parse_address(each)) is Reach.PUBLIC)


def _dialled_at(view: SwarmView, peer: PeerId) -> tuple[str, ...]:
    record = view.get(peer)
    return () if record is None else view.dialled_at(record)
