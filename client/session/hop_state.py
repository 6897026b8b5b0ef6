"""The state of one hop of a session.  Pure: the stream to it is `client.session.hop_link`."""

from __future__ import annotations

from dataclasses import dataclass, field

from client.session.repair.replay_plan import HopProgress
from routing.chains.hops import Hop
from routing.names import PeerId
from tensor_codec.errors import PeerFault, Refused
from tensor_codec.messages.session import Here, Opened, Relinked


@dataclass(frozen=True, slots=True)
class Neighbours:
    """predecessor, successor: None where it must not know them.  relay: the client carries its outputs."""

    predecessor: PeerId | None
    successor: PeerId | None
    relay: bool


ALONE = Neighbours(None, None, relay=False)


@dataclass(slots=True, eq=False)
class HopState:
    """One hop, from the moment that it opened the session.

    dtype: of its computation.  codec: of hidden states to and from it.
    near: the neighbours that it was told last; near_before: until it confirms these, those before them.
    progress: of its last report, at the change of the route.  queue: see `Opened`.
    push: it reaches its successor.
    leaving: it goes on for a while.  refused: it could not take a step, and may take it later.
    error: the reason why it was given up.  blamed: another peer is preferred from now on.
    here, asked_at: its last answer to Where, and the time of an unanswered Where.
    closed: the client has left it.
    """

    hop: Hop
    dtype: str
    codec: str
    near: Neighbours = ALONE
    near_before: Neighbours = ALONE
    progress: HopProgress = field(default_factory=HopProgress)
    queue: float = 0.0
    push: bool = False
    leaving: bool = False
    refused: bool = False
    error: PeerFault | Refused | None = None
    blamed: bool = False
    here: Here | None = None
    asked_at: float | None = None
    closed: bool = False

    @property
    def relay(self) -> bool:
        """Whether the client carries its outputs."""
        return self.near.relay

    @property
    def fed(self) -> bool:
        """Whether the client sends its inputs."""
        return self.near.predecessor is None

    @property
    def alive(self) -> bool:
        """Whether the session goes on there, by present knowledge."""
        return self.error is None and not self.closed

    @property
    def avoided(self) -> bool:
        """Whether another peer is preferred."""
        return self.leaving or self.refused or self.blamed

    @property
    def can_reorder(self) -> bool:
        """Whether it can reorder the session's rows."""
        return self.progress.orders is not None

    def opened(self, reply: Opened) -> None:
        """It has taken the session."""
        progress = HopProgress(cut=reply.cut, orders=0 if reply.rows else None)
        self.push, self.progress, self.queue = reply.push, progress, reply.queue

    def relink(self, near: Neighbours) -> None:
        """It gets new neighbours, and may take steps again."""
        self.near_before, self.near, self.refused = self.near, near, False

    def relinked(self, reply: Relinked, codec: str) -> None:
        """It has taken its new neighbours, and reports its position."""
        self.push, self.codec, self.near_before = reply.push, codec, self.near
        orders = reply.orders if self.can_reorder else None
        self.progress = HopProgress(reply.length, reply.kept, reply.step, reply.cut, orders, reply.follows)

    def may_name(self, peer: str, *, successor: bool) -> bool:
        """Whether it can know anything of this peer: a neighbour, as far as it was told."""
        near = (self.near, self.near_before)
        return peer in [each.successor if successor else each.predecessor for each in near]

    def resume(self, length: int) -> None:
        """It goes on from `length` positions, by a Resume."""
        self.progress = HopProgress(length, cut=self.progress.cut, orders=self.progress.orders)

    def ask(self, now: float) -> None:
        """It is asked for its progress."""
        self.asked_at = now

    def answer(self, here: Here) -> None:
        """It reports its progress."""
        self.here, self.asked_at = here, None

    def forget_answers(self) -> None:
        """Its report was of another route."""
        self.here = self.asked_at = None

    def set_leaving(self, leaving: bool = True) -> None:
        """Another hop shall take over while this one works; False: there is no other."""
        self.leaving = leaving

    def refuse(self) -> None:
        """It could not take a step, and may take it later."""
        self.refused = True

    def fail(self, error: PeerFault | Refused, *, blame: bool) -> None:
        """It is of no use any more; the first reason counts.  blame: the peer is not to be tried at once."""
        if self.error is None:
            self.error, self.blamed = error, blame

    def close(self) -> None:
        """The client leaves it."""
        self.closed = True
