"""Keeps this node's reach known: asks peers, tells the record, and writes what the operator should read."""

from __future__ import annotations

import logging
import random
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import trio

from node.network.addresses import parse_address
from node.network.own_addresses import OwnAddresses
from node.network.peer_info import QuestionStream
from node.network.reachability.candidates import seen_as, to_ask_about, whom_to_ask
from node.network.reachability.own_reach import OwnReach, own_reach, report
from node.network.reachability.state import Reachability, Told
from routing.names import PeerId
from routing.view.view import SwarmView
from tensor_codec.errors import PeerFault, PeerGone, Refused, RemoteProtocolError
from tensor_codec.limits import Limits
from tensor_codec.messages.fields import Failed
from tensor_codec.messages.reach import (
    NONCE_BYTES,
    REACH_PROTOCOL,
    ReachQuestion,
    decode_reached,
    decode_seen,
    encode_reach,
)

if TYPE_CHECKING:
    from node.network.streams import FramedStream

LOOK_SECONDS = 1.0  # between looks at this node's addresses and at the peers that can be asked

log = logging.getLogger("raceme")


class ReachHost(Protocol):
    """The part of `node.network.host.Host` that questions need."""

    own: OwnAddresses

    @property
    def peer_id(self) -> PeerId:
        """This node's own."""

    def connected(self) -> set[PeerId]:
        """The peers with a live connection."""

    async def open_stream(
        self, peer: PeerId, addresses: Sequence[str], protocol: str, *, seconds: float
    ) -> FramedStream:
        """A new stream; seconds: for the connection.  Raises PeerFault."""


async def ask_for_reach(stream: QuestionStream, addresses: Sequence[str], limits: Limits) -> Told:
    """One question, on a new stream of REACH_PROTOCOL, which is closed then.

    addresses: empty to learn one's own IP address alone.  Raises PeerFault, Refused.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    try:
        seconds = limits.frame_start_seconds
        await stream.send(encode_reach(ReachQuestion(tuple(addresses), nonce)), seconds)
        seen = decode_seen(await _next(stream, seconds))
        if isinstance(seen, Failed):
            raise seen.error()
        _check(seen.nonce, nonce)
        host = _host_of(seen.address)
        outcomes = {}
        if addresses:
            reached = decode_reached(await _next(stream, seconds + limits.reach_dial_seconds))
            if isinstance(reached, Failed):
                raise reached.error()
            _check(reached.nonce, nonce)
            known = {index: each for index, each in reached.outcomes.items() if index < len(addresses)}
            outcomes = {seen_as(addresses[index], host): outcome for index, outcome in known.items()}
    except BaseException:
        await stream.reset()
        raise
    await stream.aclose()
    return Told(host, outcomes)


async def _next(stream: QuestionStream, seconds: float) -> bytes | bytearray | memoryview:
    frame = await stream.receive(seconds)
    if frame is None:
        raise PeerGone("the stream was closed instead of an answer")
    return frame


def _check(found: bytes, nonce: bytes) -> None:
    if found != nonce:
        raise RemoteProtocolError("an answer to another question")


def _host_of(text: str) -> str:
    try:
        address = parse_address(text)
    except ValueError as error:
        raise RemoteProtocolError(f"it sees us at an address that is none: {error}") from None
    if address.kind not in ("ip4", "ip6") or address.is_wildcard:
        raise RemoteProtocolError(f"it sees us at {text}, which is no single host")
    return address.host


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
        self.state = Reachability()
        self.own: OwnReach = own_reach(self.state.verdict, host.own)
        self._host = host
        self._view = view
        self._addresses = addresses
        self._changed = changed
        self._limits = limits
        self._rng = rng
        self._offers: dict[str, tuple[str, ...]] = {}  # by origin
        self._relays: tuple[PeerId, ...] = ()
        self._helps = False
        self._news = trio.Event()
        self._reported: OwnReach | None = None

    def offer(self, origin: str, addresses: Sequence[str]) -> None:
        """Further addresses of this node, announced once peers have reached them.

        origin: of these, "nat-pmp" for instance; they take the place of its earlier ones.
        """
        self._offers[origin] = tuple(addresses)
        self._wake()

    def set_relays(self, relays: Sequence[PeerId]) -> None:
        """The peers that relay for this node now."""
        self._relays = tuple(relays)
        self._tell()

    def set_helps(self, helps: bool) -> None:
        """Whether this node relays for others."""
        self._helps = helps
        self._tell()

    async def known(self, seconds: float) -> OwnReach:
        """What is known of the node's reach as soon as others reach it; else after so many seconds."""
        with trio.move_on_after(seconds):
            while self.own.reach not in ("public", "relayed"):
                await self._news.wait()
        return self.own

    @property
    def summary(self) -> str:
        """One line for the operator."""
        return report(self.state.verdict, self.own, self._host.own)

    async def run(self) -> None:
        """Ask until cancelled.  A node that this machine alone reaches asks nobody."""
        async with trio.open_nursery() as nursery:
            while True:
                now, own, state = trio.current_time(), self._host.own, self.state
                further = [address for offered in self._offers.values() for address in offered]
                if state.set_addresses(to_ask_about(own.announced, own.listening, further), now):
                    self._tell()
                if state.addresses and not state.seconds_left(now):
                    view, connected = self._view(), self._host.connected()
                    peers = whom_to_ask(view.records(), {self._host.peer_id}, connected, self._rng)
                    for peer in state.to_ask(peers, now):
                        nursery.start_soon(self._ask, peer, state.addresses)
                    self._tell()
                with trio.move_on_after(LOOK_SECONDS):
                    await self._news.wait()

    async def _ask(self, peer: PeerId, addresses: tuple[str, ...]) -> None:
        """Ask one peer: the one place that catches its faults."""
        told = None
        seconds = self._limits.dial_seconds
        try:
            with trio.move_on_after(3 * seconds):
                stream = await self._host.open_stream(
                    peer, self._addresses(peer), REACH_PROTOCOL, seconds=seconds
                )
                told = await ask_for_reach(stream, addresses, self._limits)
        except (PeerFault, Refused) as fault:  # an older version does not know the protocol
            log.debug("%s does not say whether it reaches us: %s", peer, fault)
        if addresses == self.state.addresses:
            self.state.answered(peer, told, trio.current_time())
        self._tell()
        self._wake()

    def _tell(self) -> None:
        """Let the record say what is known now, and the log once."""
        own = own_reach(self.state.verdict, self._host.own, self._relays, helps=self._helps)
        if own != self.own:
            self.own = own
            self._changed(own)
            self._wake()
        if self.state.verdict.reach != "unknown" and own != self._reported:
            self._reported = own
            log.log(logging.INFO if own.reach == "public" else logging.WARNING, "%s", self.summary)

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()
