"""A client learns its own IP address on the Internet, to know the servers that are in its house."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable

import trio

from node.network.addresses import Reach, reach_of
from node.network.reachability.asking import ReachHost, ask_for_reach
from node.network.reachability.candidates import FAMILIES, Family, whom_to_ask
from routing.names import PeerId
from routing.view.view import SwarmView
from tensor_codec.errors import PeerFault, Refused
from tensor_codec.limits import Limits

LOOK_SECONDS = 5.0  # between looks at whether some server has private addresses
LEARN_SECONDS = 900.0  # between two questions; a laptop changes its place
MAX_ASKED = 3

log = logging.getLogger(__name__)


async def learn_seen(
    host: ReachHost,
    view: Callable[[], SwarmView],
    addresses: Callable[[PeerId], tuple[str, ...]],
    found: Callable[[Iterable[str]], None],
    limits: Limits,
    rng: random.Random,
) -> None:
    """Until cancelled: while a server with private addresses is known, ask peers how they see us.

    Over IPv4 and IPv6.  A swarm without such a server is asked nothing.  found: called with the IP addresses.
    """
    while True:
        present = view()
        if not any(entry.record.lan for entry in present.entries.values()):
            await trio.sleep(LOOK_SECONDS)
            continue
        seen = set[str]()
        for kind in FAMILIES:
            peers = whom_to_ask(present.records(), {host.peer_id}, host.connected(kind), rng, kind)
            for peer in peers[: 2 * MAX_ASKED]:
                host_seen = await _ask(host, peer, addresses(peer), kind, limits)
                if host_seen is not None and reach_of(host_seen) is Reach.PUBLIC:
                    seen.add(host_seen)
                    break
        if seen:
            found(seen)
        await trio.sleep(LEARN_SECONDS if seen else LOOK_SECONDS * 12)


async def _ask(
    host: ReachHost, peer: PeerId, addresses: tuple[str, ...], kind: Family, limits: Limits
) -> str | None:
    """The IP address at which one peer sees us over this family; None without an answer."""
    try:
        with trio.move_on_after(2 * limits.dial_seconds):
            stream = await host.open_question(peer, addresses, kind)
            return (await ask_for_reach(stream, (), limits)).seen
    except (PeerFault, Refused) as fault:
        log.debug("%s does not say how it sees us: %s", peer, fault)
    return None
