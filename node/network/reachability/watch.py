"""Keeps this node's reach known: asks peers, tells the record, and writes what the operator should read."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import trio

from node.network.addresses import Reach, reach_of
from node.network.reachability.asking import ReachHost, ask_for_reach
from node.network.reachability.candidates import (
    FAMILIES,
    Family,
    is_public,
    of_family,
    to_ask_about,
    whom_to_ask,
)
from node.network.reachability.link_watch import LinkWatch
from node.network.reachability.own_reach import OwnReach, own_reach, report
from node.network.reachability.state import Reachability, Told, Verdict, together
from routing.names import PeerId
from routing.view.view import SwarmView
from tensor_codec.errors import PeerFault, Refused
from tensor_codec.limits import Limits

LOOK_SECONDS = 1.0  # between looks at this node's addresses and at the peers that can be asked

log = logging.getLogger("raceme")


@dataclass(slots=True)
class Hooks:
    """The other parts of a node that reach has to do with; whoever assembles the node sets them.

    askers: the peers that have asked this node.
    on_failed_offer: called after a round in which peers have not reached an offered address.
    on_change: called when relays may be wanted, or no more.
    seen_by_relays: the IP addresses at which relays see this node now.
    """

    askers: Callable[[], Collection[PeerId]] = tuple
    on_failed_offer: Callable[[], None] = lambda: None
    on_change: Callable[[], None] = lambda: None
    seen_by_relays: Callable[[], Collection[str]] = tuple


class ReachWatch:
    """Asks peers whether they reach this node, for as long as `run` runs.

    view: the swarm as known now.  addresses: of a peer; empty where unknown.
    changed: called with what the record should say, whenever that is another.
    """

    def __init__(
        self,
        host: ReachHost,
        view: Callable[[], SwarmView],
        addresses: Callable[[PeerId], tuple[str, ...]],
        changed: Callable[[OwnReach], None],
        limits: Limits,
        rng: random.Random,
    ) -> None:
        self.hooks = Hooks()
        self.states: dict[Family, Reachability] = {kind: Reachability() for kind in FAMILIES}
        self.own: OwnReach = own_reach(Verdict(), host.own)
        self._host = host
        self._view = view
        self._addresses = addresses
        self._changed = changed
        self._limits = limits
        self._rng = rng
        self._offers: dict[str, tuple[str, ...]] = {}  # by origin
        self._relays: tuple[tuple[PeerId, ...], tuple[str, ...]] = (), ()
        self._relay_mbit = 0  # it carries nothing for others
        self._news = trio.Event()
        self._relays_saw: frozenset[str] = frozenset()
        self._reported: OwnReach | None = None

    def offer(self, origin: str, addresses: Sequence[str]) -> None:
        """Further addresses of this node, announced once peers have reached them.

        origin: of these, "nat-pmp" for instance; they take the place of its earlier ones.
        """
        self._offers[origin] = tuple(addresses)
        self._wake()

    def set_relays(self, relays: Sequence[PeerId], through: Sequence[str] = ()) -> None:
        """The peers that relay for this node now, and the multiaddrs of those that the operator has named."""
        if (found := (tuple(relays), tuple(through))) != self._relays:
            self._relays = found
            self._tell()

    def set_helps(self, mbit: int) -> None:
        """This node relays for others, at so many 10**6 bits per second."""
        self._relay_mbit = max(1, mbit)
        self._tell()

    async def known(self, seconds: float) -> OwnReach:
        """What is known of the node's reach as soon as others reach it; else after so many seconds."""
        with trio.move_on_after(seconds):
            while self.own.reach not in ("public", "relayed"):
                await self._news.wait()
        return self.own

    async def changed(self) -> None:
        """Return when something was learnt, or may have been."""
        await self._news.wait()

    async def lost(self, seconds: float) -> None:
        """Return when for so many seconds nobody has reached this node, nor any relay relayed to it."""
        while True:
            while self.own.reach != "none":
                await self._news.wait()
            with trio.move_on_after(seconds) as patience:
                while self.own.reach == "none":
                    await self._news.wait()
            if patience.cancelled_caught:
                return

    @property
    def verdict(self) -> Verdict:
        """Over all families of IP."""
        return together(list(self.states.values()))

    @property
    def wants_relays(self) -> bool:
        """Whether nobody reaches this node, or nobody over IPv4, which more peers have than IPv6.

        Or whether its neighbours alone do, while a relay in the swarm can be dialled from the Internet.
        """
        verdict = self.verdict
        if verdict.reach == "none" or self.states["ip4"].verdict.reach == "none":
            return True
        is_near = verdict.reach == "public" and not verdict.seen and not self._host.own.chosen
        return is_near and any(each.helps and is_public(each) for each in self._view().records())

    @property
    def summary(self) -> str:
        """One line for the operator."""
        return report(self.verdict, self.own, self._host.own)

    async def run(self) -> None:
        """Ask until cancelled.  A node that this machine alone reaches asks nobody."""
        links = LinkWatch()
        async with trio.open_nursery() as nursery:
            while True:
                now, own = trio.current_time(), self._host.own
                asked = to_ask_about(own.announced, own.listening, self._offered())
                if (why := links.why_ask(*self._host.links(), now)) is not None:
                    self.check_again(why)
                if self._has_moved():
                    self.check_again("relays see this node at another address")
                for kind, state in self.states.items():
                    if state.set_addresses(of_family(asked, kind), now):
                        self._tell()
                    if state.addresses and not state.seconds_left(now):
                        self._go_on(kind, state, nursery)
                with trio.move_on_after(LOOK_SECONDS):
                    await self._news.wait()

    def check_again(self, why: str) -> None:
        """Ask anew; what is known stands until then."""
        log.debug("whether others reach this node is asked again: %s", why)
        for state in self.states.values():
            state.check_again(trio.current_time())

    def _has_moved(self) -> bool:
        """Whether relays see this node elsewhere than the peers did that were asked; once for each place."""
        elsewhere = frozenset(self.hooks.seen_by_relays())
        if elsewhere == self._relays_saw or any(state.is_under_way for state in self.states.values()):
            return False
        self._relays_saw = elsewhere
        seen = self.verdict.seen
        return bool(seen and elsewhere) and elsewhere.isdisjoint(seen)

    def _go_on(self, kind: Family, state: Reachability, nursery: trio.Nursery) -> None:
        """Ask those whose turn it is, or end the round."""
        peers = whom_to_ask(
            self._view().records(),
            {self._host.peer_id},
            self._host.connected(kind),
            self._rng,
            kind,
            self.hooks.askers(),
        )
        before = state.rounds
        for peer in state.to_ask(sorted(peers, key=self._host.met_from_own_port), trio.current_time()):
            nursery.start_soon(self._ask, peer, kind, state.addresses)
        self._tell()
        if state.rounds > before and not state.verdict.failures.keys().isdisjoint(self._offered()):
            self.hooks.on_failed_offer()

    def _offered(self) -> list[str]:
        return [address for offered in self._offers.values() for address in offered]

    async def _ask(self, peer: PeerId, kind: Family, addresses: tuple[str, ...]) -> None:
        """Ask one peer: the one place that catches its faults."""
        told, state = None, self.states[kind]
        try:
            with trio.move_on_after(3 * self._limits.dial_seconds):
                stream = await self._host.open_question(peer, self._addresses(peer), kind)
                told = await ask_for_reach(stream, addresses, self._limits)
        except (PeerFault, Refused) as fault:  # an older version does not know the protocol
            log.debug("%s does not say whether it reaches us: %s", peer, fault)
        if told is not None and self._host.met_from_own_port(peer):
            told = Told(told.seen, {each: said for each, said in told.outcomes.items() if said != "reached"})
        if told is not None and reach_of(told.seen) is Reach.PRIVATE:
            record = self._view().get(peer)
            told = replace(told, house=record.seen if record is not None else "")
        if addresses == state.addresses:
            if told is None and peer not in self._host.connected(kind):
                state.unreached(peer, trio.current_time())
            else:
                state.answered(peer, told, trio.current_time())
        self._tell()
        self._wake()

    def _tell(self) -> None:
        """Let the record say what is known now, and the log once."""
        verdict = self.verdict
        own = own_reach(verdict, self._host.own, *self._relays, relay_mbit=self._relay_mbit)
        if own != self.own:
            self.own = own
            self._changed(own)
            self.hooks.on_change()
            self._wake()
        if verdict.reach != "unknown" and own != self._reported:
            self._reported = own
            log.log(logging.INFO if own.reach == "public" else logging.WARNING, "%s", self.summary)

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()
