"""Asking a peer whether it reaches this node: one question over one family of IP, the answer in two parts."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Hashable, Sequence
from typing import TYPE_CHECKING, Protocol

import trio

from node.network.addresses import Reach, parse_address, reach_of
from node.network.dialling.dialler import family_of
from node.network.own_addresses import OwnAddresses
from node.network.peer_info import QuestionStream
from node.network.reachability.candidates import Family, of_family, seen_as
from node.network.reachability.state import Told
from node.network.streams import FramedStream
from node.network.transport.link import SocketLink
from routing.names import PeerId
from tensor_codec.errors import PeerGone, RemoteProtocolError, SlowPeer
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
    from node.network.host import Host
    from node.network.transport.connection import Connection


class ReachHost(Protocol):
    """What questions need of this node's host; `Questions` has it."""

    @property
    def own(self) -> OwnAddresses:
        """This node's addresses, as last read."""

    @property
    def peer_id(self) -> PeerId:
        """This node's own."""

    def connected(self, kind: Family) -> set[PeerId]:
        """The peers with a live direct connection over this family."""

    def links(self) -> tuple[Collection[Hashable], Collection[Hashable]]:
        """The live direct connections: those that peers of the Internet have opened, and this node's own."""

    def met_from_own_port(self, peer: PeerId) -> bool:
        """Whether this node has dialled that peer from the port on which it listens.

        A router may let that peer in at the same port for this reason alone.
        """

    async def open_question(self, peer: PeerId, addresses: Sequence[str], kind: Family) -> QuestionStream:
        """A new stream of REACH_PROTOCOL, over this family of IP.  Raises PeerFault."""


class Questions:
    """The face of a host towards questions."""

    def __init__(self, host: Host, limits: Limits) -> None:
        self._host = host
        self._limits = limits

    @property
    def own(self) -> OwnAddresses:
        """See `ReachHost.own`."""
        return self._host.own

    @property
    def peer_id(self) -> PeerId:
        """See `ReachHost.peer_id`."""
        return self._host.peer_id

    def connected(self, kind: Family) -> set[PeerId]:
        """See `ReachHost.connected`."""
        return {each.peer for each in self._host.connections if family_of(each) == kind}

    def links(self) -> tuple[Collection[Hashable], Collection[Hashable]]:
        """See `ReachHost.links`."""
        live = [each for each in self._host.connections if each.is_established and each.relayed_by is None]
        others = [each for each in live if not each.is_initiator and _comes_from_afar(each)]
        return others, [each for each in live if each.is_initiator]

    def met_from_own_port(self, peer: PeerId) -> bool:
        """See `ReachHost.met_from_own_port`."""
        ports = self._host.dialler.ports
        own = [each for each in self._host.connections.of(peer) if each.is_initiator]
        links = [each.channel.link for each in own]
        return any(isinstance(link, SocketLink) and ports.has(link.local_port) for link in links)

    async def open_question(self, peer: PeerId, addresses: Sequence[str], kind: Family) -> QuestionStream:
        """See `ReachHost.open_question`."""
        seconds = self._limits.dial_seconds
        with trio.move_on_after(seconds):
            ways = of_family(addresses, kind)
            connection = await self._host.dialler.connect_directly(peer, ways, kind)
            stream = connection.open()
            stream.propose(REACH_PROTOCOL)
            return FramedStream(
                stream, peer, REACH_PROTOCOL, self._limits, self._host.traffic, connection.prefix
            )
        raise SlowPeer(f"no connection to {peer} within {seconds:g} s")


def _comes_from_afar(connection: Connection) -> bool:
    remote = connection.channel.link.remote
    return remote is not None and reach_of(remote[0]) is Reach.PUBLIC


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
