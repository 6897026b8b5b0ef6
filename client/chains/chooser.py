"""A session's access to the swarm: chains to choose from, streams, and a place for reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from client.chains.avoided_peers import AvoidedPeers
from routing.blocks import Blocks
from routing.chains.hops import Chain, Hop
from routing.chains.measured import Measured
from routing.names import PeerId
from tensor_codec.errors import PeerFault
from tensor_codec.frame import Buffer

if TYPE_CHECKING:
    from client.chains.of_sessions import OfSessions


class PeerStream(Protocol):
    """The part of `node.network.streams.FramedStream` that a client needs."""

    @property
    def peer(self) -> PeerId:
        """The authenticated peer at the other end."""

    @property
    def has_better_way(self) -> bool:
        """Whether it runs through a relay, and a direct connection to the peer is there."""

    @property
    def is_free(self) -> bool:
        """Whether a short frame goes out without a wait."""

    async def send(self, frame: Buffer | Sequence[Buffer], seconds: float | None = None) -> None:
        """Send one frame, to be taken within `seconds`.  Raises SlowPeer, PeerGone."""

    async def receive(
        self, seconds: float | None = None, taker: Callable[[Buffer], bool] | None = None
    ) -> Buffer | None:
        """The next frame, None at a clean end.  Raises PeerFault."""

    async def aclose(self) -> None:
        """End this side cleanly."""

    async def reset(self) -> None:
        """End both sides at once."""


@dataclass(frozen=True, slots=True)
class HopTerms:
    """What a session has to know of a hop to agree on a codec with it.

    dtype: of its computing.  codecs: that it reads besides fp32 and bf16.
    link_seconds: the round trip from the hop before it, or from the client.  link_speed: of that link, bytes
    per second; 0.0: unknown.  home_seconds: the round trip to the client.  batches: see `Record`.
    """

    dtype: str
    codecs: tuple[str, ...] = ()
    link_seconds: float = 0.0
    link_speed: float = 0.0
    home_seconds: float = 0.0
    batches: bool = False


class Chooser(Protocol):
    """Chooses chains by the present view, without waiting."""

    def choose(
        self,
        start: int,
        stop: int,
        *,
        excluded: frozenset[PeerId] = frozenset(),
        last_resort: bool = False,
        kinds: frozenset[str] = frozenset(),
        tokens: int = 0,
        other_hops: int = 0,
        observed: Mapping[PeerId, float] | None = None,
    ) -> Chain:
        """The best chain over blocks [start, stop) known now, of peers that may be used.  Raises NoChain.

        excluded: peers not to be used.  last_resort: peers that have failed lately may be used.
        kinds: of peers (`kind_of`) that are preferred to all others.
        tokens: of cache that the session may come to need.  Peers with less free cache are used only where
        no other is left; peers that refuse sessions of this length are never used.
        other_hops: that the session's chain has for its other blocks.
        observed: seconds per block of peers, as the session sees them now.
        """

    def cost(self, hops: Sequence[Hop], observed: Mapping[PeerId, float]) -> float:
        """Expected seconds of a step along these hops; infinite where a peer has left the view."""

    def seconds_per_position(self, hops: Sequence[Hop]) -> float:
        """Of a prompt at all of these hops, as they announce it; infinite where a peer has left the view."""

    def kind_of(self, peer: PeerId) -> str | None:
        """The kind of a peer's arithmetic; peers of one kind give equal tokens.  None: the peer has left."""

    def terms_of(self, hops: Sequence[Hop]) -> list[HopTerms | None]:
        """What the peers of a chain announce, in order; None for a peer that has left."""

    @property
    def blame(self) -> AvoidedPeers:
        """The peers that failed, of all sessions, and what they report of each other."""


class SwarmAccess(Chooser, Protocol):
    """A chooser that also waits, dials and takes reports.  See `client.chains.chain_choice.ChainChooser`."""

    async def wait_for_chain(self, choose: Callable[[bool], Chain], *, measured: Blocks | None) -> Chain:
        """The first chain that `choose` finds.  Set your own deadline.

        choose: takes True if peers that have failed lately may be used, and raises NoChain.
        measured: the distances to peers of these blocks are measured before the choice; None: to nobody.
        """

    @property
    def of_sessions(self) -> OfSessions:
        """What all sessions of this client have in common."""

    async def open_stream(self, peer: PeerId, protocol: str) -> PeerStream:
        """Raises PeerFault."""

    def fault(self, peer: PeerId, error: PeerFault, share: float = 1.0) -> None:
        """A peer was wrong, slow or gone: avoid it for a while.  share: of a fault."""

    def refused(self, peer: PeerId, retry_after_seconds: float | None) -> None:
        """A peer said no: ask others for a while."""

    def report_queue(self, peer: PeerId, queue: float) -> bool:
        """A hop reports the present wait of steps; whether it is much longer than was known."""

    @property
    def measured(self) -> Measured:
        """The figures of this client's sessions."""

    def observe_step(self, hops: Sequence[Hop], held: Sequence[float], total: float) -> None:
        """A decode step of one row took `total` seconds.  held: seconds at each hop, by its report."""
