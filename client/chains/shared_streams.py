"""Streams that many sessions of this client share: one to each peer at which several of them have a hop.

Steps that are sent at one moment go to a first hop in one frame, and a last hop may send the results of a
batch in one (`tensor_codec.messages.steps`).  A session's own streams stay: for everything else, and for all
of it where there is no shared stream.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import trio

from node.runtime.nurseries import background_nursery
from routing.names import PeerId
from tensor_codec.errors import PeerFault, PeerGone
from tensor_codec.frame import Buffer
from tensor_codec.limits import Limits
from tensor_codec.messages.fields import read_message
from tensor_codec.messages.session import GATHER_BYTES, Result, Step, encode_step
from tensor_codec.messages.steps import encode_gather, encode_steps, grouped, read_results

LEAST_SESSIONS = 2  # at a peer, that share a stream to it
_RESULTS = frozenset({"results"})


class Frames(Protocol):
    """The part of `client.chains.chooser.PeerStream` that is needed here."""

    async def send(self, frame: Buffer | Sequence[Buffer], seconds: float | None = None) -> None:
        """See PeerStream."""

    async def receive(self, seconds: float | None = None) -> Buffer | None:
        """See PeerStream."""

    async def aclose(self) -> None:
        """See PeerStream."""


OpenPush = Callable[[], Awaitable[Frames]]


@dataclass(slots=True, eq=False)
class Membership:
    """The part of one session in a shared stream.

    take: called with each result.  lost: called when the stream has broken.
    at_an_end: of its chain is the hop, where steps begin or results come from.
    is_used: the session's steps on their way went over the shared stream.
    """

    stream: SharedStream
    session: bytes
    take: Callable[[Result], None]
    lost: Callable[[PeerFault], None]
    at_an_end: bool = True
    is_used: bool = False

    def takes(self, step: Step, *, alone: bool) -> bool:
        """Whether a step goes over it: all of a session that are on their way go over one stream.

        alone: no other step of the session is on its way.
        """
        if alone:
            self.is_used = self.stream.is_ready and not step.bulk
        return self.is_used

    def put(self, step: Step) -> None:
        """Send a step, with those that other sessions send at this moment."""
        self.stream.put(step)

    def end_use(self) -> None:
        """The next step may go over another stream: no step on its way counts any more."""
        self.is_used = False

    def leave(self) -> None:
        """The session leaves the hop."""
        self.stream.leave(self)


@dataclass(slots=True, eq=False)
class SharedStream:
    """The shared stream to one peer.  id: names it to the peer.  most: steps of a frame."""

    most: int
    id: bytes = field(default_factory=lambda: secrets.token_bytes(GATHER_BYTES))
    members: dict[bytes, Membership] = field(default_factory=dict)
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    _stream: Frames | None = None
    _is_tried: bool = False
    _waiting: list[Step] = field(default_factory=list)
    _wanted: trio.Event = field(default_factory=trio.Event)
    _fault: PeerFault | None = None

    @property
    def is_ready(self) -> bool:
        """Whether steps go over it now."""
        return self._stream is not None and len(self.members) >= LEAST_SESSIONS

    @property
    def is_over(self) -> bool:
        """Whether it was open, or nobody could open it, and no session has a part in it any more."""
        return self._is_tried and not self.members

    def join(self, member: Membership, nursery: trio.Nursery, open_push: OpenPush) -> None:
        """Take in a session; the second one whose chain ends here opens the stream, in this nursery."""
        self.members[member.session] = member
        ends = sum(one.at_an_end for one in self.members.values())
        if ends >= LEAST_SESSIONS and not self._is_tried:
            self._is_tried = True
            nursery.start_soon(self._run, open_push)

    def leave(self, member: Membership) -> None:
        """Let a session go; the last one closes the stream."""
        if self.members.get(member.session) is member:
            del self.members[member.session]
        if not self.members:
            self._scope.cancel()

    def put(self, step: Step) -> None:
        """Send a step once all tasks that run now have put theirs."""
        self._waiting.append(step)
        self._wanted.set()

    async def _run(self, open_push: OpenPush) -> None:
        stream: Frames | None = None
        try:
            with self._scope:
                stream = await open_push()
                await stream.send(encode_gather(self.id))
                self._stream = stream
                async with background_nursery() as nursery:
                    nursery.start_soon(self._send, stream)
                    await self._receive(stream)
        except PeerFault as fault:
            self._fault = fault
        finally:
            self._stream = None
            if stream is not None:
                with trio.CancelScope(shield=True), trio.move_on_after(1):
                    await stream.aclose()
        why = self._fault or PeerGone("the shared stream has ended")
        for member in list(self.members.values()):
            member.end_use()
            member.lost(why)

    async def _receive(self, stream: Frames) -> None:
        while (frame := await stream.receive()) is not None:
            for session, result in read_results(read_message(frame, _RESULTS), self.most):
                if (member := self.members.get(session)) is not None:
                    member.take(result)

    async def _send(self, stream: Frames) -> None:
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            steps, self._waiting = self._waiting, []
            try:
                for group in grouped(steps, lambda step: step, self.most):
                    await stream.send(_frame_of(group))
            except PeerFault as fault:
                self._fault = fault
                self._scope.cancel()


def _frame_of(steps: list[Step]) -> list[Buffer]:
    return encode_step(steps[0]) if len(steps) == 1 else encode_steps(steps)


@dataclass(slots=True)
class SharedStreams:
    """The shared streams of a client, by peer."""

    most: int = Limits().max_steps_per_frame
    _streams: dict[PeerId, SharedStream] = field(default_factory=dict)

    def of(self, peer: PeerId) -> SharedStream:
        """The one to a peer: a new one where the one before is over."""
        stream = self._streams.get(peer)
        if stream is None or stream.is_over:
            self._streams = {other: one for other, one in self._streams.items() if not one.is_over}
            stream = self._streams[peer] = SharedStream(self.most)
        return stream
