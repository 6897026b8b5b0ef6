"""One session at this node: its route, its state, and the outputs that it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import trio
from torch import Tensor

from node.model.adapters.prefix import SpanPrefix
from node.model.blocks.kv_pages import Prefix
from node.network.budgets.large_frames import FramePlace
from node.serving.adapters.store import HopAdapter
from node.serving.executor.engine import Answer, StepCache
from node.serving.sessions.inbox import Arrived, Inbox, Landed, UnderWay
from node.serving.sessions.push import Outlet
from node.serving.sessions.state import ServerSession
from node.serving.sessions.step_room import no_room
from routing.names import PeerId
from tensor_codec.errors import PeerFault, Refused, RemoteProtocolError
from tensor_codec.frame import Buffer
from tensor_codec.journal import Journal
from tensor_codec.messages.contract import VALUE_BYTES, Contract
from tensor_codec.messages.session import Relink, Step, owner_tag

# The tag of a session's owner (`owner_tag`), and its id.  An id alone is no secret: others may open it too.
SessionKey = tuple[bytes, bytes]
LEAST_TOLD_BYTES = (
    4096  # of a step that tells the speed of its link: prompts do, and nearly all tokens do not
)


class FrameStream(Protocol):
    """The part of a framed stream (see node/network/streams.py) that a session needs.

    limit: most bytes of a frame that `receive` has not returned yet.  judge: of frames that are large; see
    there.
    """

    limit: int
    judge: Callable[[bytes, int], Refused | None] | None

    @property
    def peer(self) -> PeerId:
        """The authenticated peer at the other end."""

    @property
    def speed(self) -> int:
        """Bytes per second of the way here; 0: unknown."""

    @property
    def prefix(self) -> str:
        """The network prefix of the peer's address; "" where it has none."""

    @property
    def relayed(self) -> bool:
        """Whether it runs through a relay."""

    async def send(self, frame: Buffer | Sequence[Buffer]) -> None:
        """Send one frame; raises SlowPeer or PeerGone."""

    def send_now(self, frame: Buffer | Sequence[Buffer]) -> bool:
        """Send one frame where that needs no waiting; False where nothing was done."""

    async def receive(
        self, seconds: float | None = None, taker: Callable[[Buffer], bool] | None = None
    ) -> Buffer | None:
        """The next frame, None at a clean end; raises PeerFault."""

    async def reset(self) -> None:
        """End both sides at once."""


class SessionCache(StepCache, Protocol):
    """The part of `node.model.blocks.kv_pages.SpanCache` that a session needs."""

    def cut(self, length: int) -> None:
        """Forget the positions from `length` on.  Raises CannotCut."""

    def select(self, order: Sequence[int]) -> None:
        """Row i becomes the former row order[i]."""

    def begin_with(self, prefix: Prefix) -> None:
        """Put a prefix in front of all positions of an empty cache.  Runs in the torch thread."""

    def close(self) -> None:
        """Give everything back."""


@dataclass(frozen=True, slots=True)
class SessionRoute:
    """The neighbours of this hop in one epoch of a session; steps of other epochs are forgotten.

    predecessor: the peer that pushes steps, or None where the client sends them.  successor: the peer that
    gets the outputs, or None.  relay: the client carries the outputs to the next hop.  pack, gather, follows:
    see `Open`.
    """

    epoch: int
    predecessor: str | None
    successor: str | None
    relay: bool
    pack: int = 0
    gather: bytes = b""
    follows: bool = False

    @property
    def sends_on(self) -> bool:
        """Whether a next hop gets the outputs, however they travel, or would of a standby."""
        return self.successor is not None or self.relay


@dataclass(slots=True)
class KeptOutputs:
    """Outputs that a session may have to send again.

    codec: of the journal and the answer.  Where a Relink changes the contract's codec, the worker follows.
    answer: to the last step, for a retry.  successor_has: positions that the next hop has.
    """

    codec: str
    journal: Journal | None = None
    answer: Answer | None = None
    successor_has: int = 0


@dataclass(frozen=True, slots=True)
class Guests:
    """What a client adds to the blocks of its session, so that their cache is its own.

    prompts: deep prompts, [blocks, positions, hidden].  adapter: of all steps.  prefix: keys and values of
    `virtual_tokens` in the first places of the cache; the session's positions do not count them.
    """

    prompts: Tensor | None = None
    adapter: HopAdapter | None = None
    prefix: Prefix | None = None
    virtual_tokens: int = 0

    @classmethod
    def of(cls, prompts: Tensor | None, adapter: HopAdapter | None) -> Guests:
        """Of a session that was opened with these."""
        if isinstance(adapter, SpanPrefix):
            return cls(prompts, prefix=adapter, virtual_tokens=adapter.virtual_tokens)
        return cls(prompts, adapter)

    def prompts_at(self, position: int) -> Tensor | None:
        """The prompts for a step from `position` on; None where there are none or they end before it."""
        prompts = self.prompts
        return prompts if prompts is not None and position < prompts.shape[1] else None


@dataclass(slots=True)
class HopSession:
    """One session at this node, and everything that belongs to it alone.

    scope: of the session's tasks.  busy: a step is being computed or passed on.  active_at: trio's clock.
    end_reason: why the session ended, if not by its client's wish.
    guests: see `Guests`.  key: of its client alone.
    """

    contract: Contract
    stream: FrameStream
    state: ServerSession
    cache: SessionCache
    outlet: Outlet
    inbox: Inbox
    route: SessionRoute
    kept: KeptOutputs
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    busy: bool = False
    active_at: float = 0.0
    end_reason: PeerFault | Refused | None = None
    guests: Guests = Guests()
    key: SessionKey = field(init=False)
    _interruptible: trio.CancelScope | None = None

    def __post_init__(self) -> None:
        self.key = owner_tag(self.stream.peer), self.contract.session
        self.stream.limit = self.contract.frame_bytes
        self.inbox.room.evicted = lambda: self.end(no_room())

    @property
    def in_use(self) -> bool:
        """Whether steps are in flight here."""
        return self.busy or bool(len(self.inbox))

    @property
    def feeder(self) -> str:
        """The peer that sends steps."""
        return self.route.predecessor or self.stream.peer

    def speed_of(self, body: Buffer) -> int:
        """Bytes per second of the way of a step from the client; 0 for one that is too short to tell."""
        return self.stream.speed if len(body) > LEAST_TOLD_BYTES else 0

    def end(self, reason: PeerFault | Refused | None) -> None:
        """Stop the session's tasks; the first reason counts."""
        if self.end_reason is None:
            self.end_reason = reason
        self.inbox.close()
        self.scope.cancel()

    def put(self, step: Step, sender: PeerId, speed: int = 0, place: FramePlace | None = None) -> None:
        """Put a step into the inbox, unless it took an older route.  Raises RemoteProtocolError.

        speed: see `Arrived`.  place: of its bytes, where there is one already.
        """
        if step.epoch == self.route.epoch:
            try:
                self.inbox.put(Arrived(step, sender, trio.current_time(), speed), place)
            except Refused as refusal:
                self.end(refusal)
        else:
            self.inbox.room.remove(place)

    async def put_when_it_fits(self, step: Step, sender: PeerId, speed: int = 0) -> None:
        """The same for a part of a long prompt or replay: its sender waits for space in the inbox."""
        if step.epoch != self.route.epoch:
            return
        fits, place = await self.inbox.wait_for_space(len(step.body))
        if fits:
            self.put(step, sender, speed, place)
        else:
            self.inbox.room.remove(place)

    def take_off(self, flight: UnderWay) -> None:
        """A step is under way without the worker, until `landed`."""
        self.busy = True
        self.inbox.take_off(flight)

    def landed(self, left: Landed | None) -> None:
        """The step is done, or `left` is for the worker."""
        self.active_at = trio.current_time()
        self.busy = left is not None
        self.inbox.land(left)

    def relink(self, order: Relink) -> None:
        """Follow a change of the route.  Raises RemoteProtocolError."""
        if order.epoch <= self.route.epoch:
            raise RemoteProtocolError(f"epoch {order.epoch} after {self.route.epoch}")
        codec = order.codec or self.contract.codec
        if self.state.length and VALUE_BYTES[codec] < VALUE_BYTES[self.contract.codec]:
            raise RemoteProtocolError(f"codec {codec} after {self.contract.codec}, which loses less")
        self.contract = replace(self.contract, codec=codec)
        self.stream.limit = self.contract.frame_bytes
        self.route = SessionRoute(
            order.epoch, order.predecessor, order.successor, order.relay, order.pack, self.route.gather,
            order.follows,
        )  # fmt: skip
        self.outlet.follow(None)
        self.inbox.order(order)
        if self._interruptible is not None:
            self._interruptible.cancel()

    def interruptible(self) -> trio.CancelScope:
        """A scope for work that a change of the route makes pointless: the change cancels it."""
        self._interruptible = trio.CancelScope()
        return self._interruptible
