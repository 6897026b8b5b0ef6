"""Answers peers that ask whether they can be reached: dials them back, at their own machine alone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from node.network.addresses import Address, Reach, reach_of
from node.network.reachability.candidates import canonical, to_dial_back
from node.network.streams import FramedStream
from routing.names import PeerId
from tensor_codec.errors import MessageError, PeerGone, Refused, TooManyStreams
from tensor_codec.limits import Limits
from tensor_codec.messages.fields import Failed, encode_failed
from tensor_codec.messages.reach import (
    REACH_FRAME_BYTES,
    REACH_PROTOCOL,
    Outcome,
    Reached,
    Seen,
    decode_reach,
    encode_reached,
    encode_seen,
)
from tensor_codec.token_bucket import TokenBucket

if TYPE_CHECKING:
    from node.network.transport.connection import MuxedStream

BUSY_SECONDS = 5.0  # for a peer to come again where others are dialled back
MAX_REMEMBERED = 4096  # peers that have asked

Probe = Callable[[PeerId, Address], Awaitable[Outcome]]


class ReachListener:
    """Serves REACH_PROTOCOL.  probe: one dial to a peer at an address, see `Prober`."""

    def __init__(self, limits: Limits, probe: Probe) -> None:
        self._limits = limits
        self._probe = probe
        self._busy = 0  # questions for which addresses are dialled now
        self._asked: OrderedDict[PeerId, TokenBucket] = OrderedDict()

    @property
    def askers(self) -> list[PeerId]:
        """The peers that have asked, the latest first."""
        return list(reversed(self._asked))

    async def serve(self, stream: MuxedStream, peer: PeerId, prefix: str) -> None:
        """A stream of a peer.  Raises PeerFault, for the host to count."""
        limits = replace(self._limits, max_frame_bytes=REACH_FRAME_BYTES)
        framed = FramedStream(stream, peer, REACH_PROTOCOL, limits, prefix=prefix)
        remote = stream.connection.channel.link.remote
        await self.answer(framed, None if remote is None else (remote[0], remote[1]))

    async def answer(self, stream: FramedStream, remote: tuple[str, int] | None) -> None:
        """Answer one question.  remote: IP address and port of the peer; None over a relay, where nobody's
        address is seen.  Raises PeerFault."""
        limits = self._limits
        frame = await stream.receive(limits.frame_start_seconds)
        if frame is None:
            raise PeerGone("the stream was closed instead of a question")
        question = decode_reach(frame)
        if remote is None:
            await stream.send(encode_failed(Failed.of(Refused("a relay shows no address"))))
            return
        host, port = canonical(remote[0]), remote[1]
        kind = "ip6" if ":" in host else "ip4"
        try:
            dialled = to_dial_back(question.addresses, host, limits.max_reach_addresses)
        except ValueError as error:
            raise MessageError(str(error)) from None
        await stream.send(encode_seen(Seen(f"/{kind}/{host}/tcp/{port}", question.nonce)))
        if not question.addresses:
            return
        try:
            outcomes = await self._dial_back(stream.peer, host, dialled)
        except Refused as refusal:
            await stream.send(encode_failed(Failed.of(refusal)))
            return
        await stream.send(encode_reached(Reached(outcomes, question.nonce)))

    async def _dial_back(
        self, peer: PeerId, host: str, dialled: Mapping[int, Address]
    ) -> Mapping[int, Outcome]:
        """What came of each address, by index.  Raises Refused where the peer or all peers ask too often."""
        if reach_of(host) is Reach.LOOPBACK:
            dialled = {}  # a peer of this machine says nothing about the way from elsewhere
        now, limits = trio.current_time(), self._limits
        rate = 1 / limits.reach_question_seconds
        asked = self._asked.setdefault(peer, TokenBucket.full(rate, limits.reach_questions_burst, now))
        self._asked.move_to_end(peer)
        while len(self._asked) > MAX_REMEMBERED:
            self._asked.popitem(last=False)
        if (missing := 1 - asked.level_at(now)) > 0:
            seconds = limits.reach_question_seconds
            raise TooManyStreams(f"one question in {seconds:g} s is answered", missing * seconds)
        if self._busy >= limits.max_reach_questions:
            raise TooManyStreams("others are being dialled back", BUSY_SECONDS)
        asked.take(1, now)
        outcomes: dict[int, Outcome] = {}

        async def probe(index: int, address: Address) -> None:
            outcomes[index] = await self._probe(peer, address)

        self._busy += 1
        try:
            async with trio.open_nursery() as nursery:
                for index, address in dialled.items():
                    nursery.start_soon(probe, index, address)
        finally:
            self._busy -= 1
        return outcomes
