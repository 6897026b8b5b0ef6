"""Relays as records tell of them: whom to ask for a reservation, through whom to reach a peer; pure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from node.network.addresses import Reach, parse_address
from node.network.reachability.candidates import reach_of_address
from node.network.relaying.circuits import RelayAt, Routes
from node.network.relaying.own_reservations import Candidate
from routing.names import PeerId
from routing.view.view import SwarmView


def relay_candidates(view: SwarmView, rtts: Mapping[PeerId, float], me: PeerId) -> list[Candidate]:
    """The peers that relay for others, as their records say.

    rtts: seconds from here to a peer and back, as far as known.
    """
    return [
        Candidate(record.peer, addresses, rtts.get(record.peer), record.role == "bootstrap")
        for record in view.records()
        if record.helps and record.peer != me and (addresses := view.dialled_at(record))
    ]


def routes_to(view: SwarmView, rtts: Mapping[PeerId, float], peer: PeerId) -> Routes:
    """The relays of a peer, the shortest way first: from here to a relay, and from there to the peer."""
    if (record := view.get(peer)) is None or not record.relays:
        return Routes()

    def seconds(relay: PeerId) -> float:
        return rtts.get(relay, math.inf) + record.rtt.get(relay, 0.0)

    relays = sorted(record.relays, key=seconds)
    return Routes(tuple(RelayAt(r, _dialled_at(view, r)) for r in relays), record.reach == "relayed")


def public_addresses(view: SwarmView, peer: PeerId) -> tuple[str, ...]:
    """Where a peer that others have reached can be dialled; none where nobody has."""
    record = view.get(peer)
    if record is None or record.reach != "public":
        return ()
    return tuple(each for each in record.addresses if reach_of_address(parse_address(each)) is Reach.PUBLIC)


def _dialled_at(view: SwarmView, peer: PeerId) -> tuple[str, ...]:
    record = view.get(peer)
    return () if record is None else view.dialled_at(record)
