"""One session at this node: what belongs to it alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import trio

from node.model.blocks.kv_pages import SpanCache
from node.serving.executor.engine import Answer
from node.serving.sessions.inbox import Arrived, Inbox
from node.serving.sessions.push import Outlet
from node.serving.sessions.state import ServerSession
from routing.names import PeerId
from tensor_codec.errors import (
    PeerFault,
    Refused,
    RemoteProtocolError,
)
from tensor_codec.frame import Buffer
from tensor_codec.journal import Journal
from tensor_codec.messages.contract import CODEC_BYTES, Contract
from tensor_codec.messages.session import (
    Open,
    Relink,
    Step,
)


class FrameStream(Protocol):
    """What a session needs of a framed stream (see node/network/streams.py)."""

    @property
    def peer(self) -> PeerId:
        """The authenticated peer at the other end."""

    async def send(self, frame: Buffer | Sequence[Buffer]) -> None:
        """Send one frame; raises SlowPeer or PeerGone."""

    async def receive(self, seconds: float | None = None) -> Buffer | None:
        """The next frame, None at a clean end; raises PeerFault."""


@dataclass(slots=True)
class HopSession:
    """One session at this node, and what belongs to it alone.

    epoch: of the route; steps of others are forgotten.  has: positions that the successor has.
    kept_codec: of journal and answer, which a Relink that changes the contract's leaves to the worker.
    answer: to the last step, for a retry.  over: why the session ended, if not by its client's wish.
    """

    opened: Open
    contract: Contract
    stream: FrameStream
    state: ServerSession
    cache: SpanCache
    kept_codec: str
    outlet: Outlet
    inbox: Inbox
    predecessor: str | None
    successor: str | None
    relay: bool
    epoch: int
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    journal: Journal | None = None
    has: int = 0
    answer: Answer | None = None
    busy: bool = False  # a step is being computed or passed on
    active_at: float = 0.0  # trio's clock
    over: PeerFault | Refused | None = None
    _interruptible: trio.CancelScope | None = None

    @property
    def in_use(self) -> bool:
        """Whether steps are in flight here."""
        return self.busy or bool(len(self.inbox))

    @property
    def feeder(self) -> str:
        """The peer that sends steps."""
        return self.predecessor or self.stream.peer

    @property
    def sends_on(self) -> bool:
        """Whether a next hop gets the outputs, however they travel."""
        return self.successor is not None or self.relay

    def end(self, reason: PeerFault | Refused | None) -> None:
        """Stop the session's tasks; the first reason stands."""
        if self.over is None:
            self.over = reason
        self.inbox.close()
        self.scope.cancel()

    def offer(self, step: Step, sender: PeerId) -> None:
        """Put a step into the inbox, unless it took an older route.  Raises RemoteProtocolError."""
        if step.epoch == self.epoch:
            self.inbox.offer(Arrived(step, sender, trio.current_time()))

    async def offer_when_there_is_room(self, step: Step, sender: PeerId) -> None:
        """The same for a part of something long: its sender is held back, and only he."""
        if step.epoch == self.epoch and await self.inbox.room():
            self.offer(step, sender)

    def relink(self, order: Relink) -> None:
        """The route has changed.  Raises RemoteProtocolError."""
        if order.epoch <= self.epoch:
            raise RemoteProtocolError(f"epoch {order.epoch} after {self.epoch}")
        codec = order.codec or self.contract.codec
        if self.state.length and CODEC_BYTES[codec] < CODEC_BYTES[self.contract.codec]:
            raise RemoteProtocolError(f"codec {codec} after {self.contract.codec}, which loses less")
        self.contract = replace(self.contract, codec=codec)
        self.epoch = order.epoch
        self.predecessor, self.successor, self.relay = order.predecessor, order.successor, order.relay
        self.inbox.order(order)
        if self._interruptible is not None:
            self._interruptible.cancel()

    def interruptible(self) -> trio.CancelScope:
        """For what a change of the route makes pointless: it ends the block."""
        self._interruptible = trio.CancelScope()
        return self._interruptible
