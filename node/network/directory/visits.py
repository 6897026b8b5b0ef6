"""Visits: a node exchanges views with peers that are no neighbours, again and again.

Neighbours may all be attackers, which pass on nothing of others.  A visit of one honest peer makes up for it:
both sides then know what either knew.  Bootstrap peers come first, since the operator has named them; one of
them may have been away when this node joined.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from typing import Literal

import trio

from node.network.directory.neighbours import DIALS_AT_ONCE, Neighbours
from routing.names import PeerId
from routing.view.view import SwarmView

FIRST_VISIT_SECONDS, VISIT_SECONDS = 4.0, 30.0  # between visits: records live for 90 s, so one may fail
LONGEST_VISIT_SECONDS = 10.0

Meeting = Literal["known", "starting", "silent"]
"""The outcome of a meeting: the peer's record is known; the peer answers and has none yet; no answer."""


async def meet(
    neighbours: Neighbours, view: Callable[[], SwarmView], peer: PeerId, addresses: Sequence[str]
) -> Meeting:
    """Exchange records with a peer that is not in the view, and see whether it is there afterwards.

    addresses: where it is said to listen.  The peer counts as any stranger: it is no bootstrap peer.
    """
    answered = False
    if view().get(peer) is None and peer not in neighbours.peers and neighbours.strangers([peer]):
        with trio.move_on_after(LONGEST_VISIT_SECONDS):
            answered = await neighbours.ask_once(peer, addresses)
    else:
        await trio.lowlevel.checkpoint()
    if view().get(peer) is not None:
        return "known"
    return "starting" if answered or peer in neighbours.peers else "silent"


async def visit_strangers(neighbours: Neighbours, bootstrap: Collection[PeerId], rng: random.Random) -> None:
    """Visit all bootstrap peers that are no neighbours, and one other server.

    Soon after the start, then ever more rarely down to every VISIT_SECONDS.
    """
    pause, turns = FIRST_VISIT_SECONDS, trio.CapacityLimiter(DIALS_AT_ONCE)

    async def visit(peer: PeerId) -> None:
        async with turns:
            with trio.move_on_after(LONGEST_VISIT_SECONDS):
                await neighbours.ask_once(peer)

    while True:
        await trio.sleep(pause * rng.uniform(0.8, 1.2))
        pause = min(VISIT_SECONDS, 2 * pause)
        no_others = {*bootstrap, *neighbours.peers}
        async with trio.open_nursery() as nursery:
            for peer in neighbours.strangers([*bootstrap, *neighbours.draw(no_others, 1)]):
                nursery.start_soon(visit, peer)
