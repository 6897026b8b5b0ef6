"""Places for the streams of py-libp2p's own protocols: Kademlia, identify, its ping.

Its handlers take about a dozen streams at once, of whatever peers, and read without a deadline.  So a peer
gets two of a protocol, and where all are in use a newcomer may take the place of another peer's stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from node.network.admission.shares import Shares
from tensor_codec.limits import Limits

LONG_SECONDS = 1.0  # an honest question is answered by then


@dataclass(slots=True, eq=False)
class ServedStream:
    """A stream that is served.  protocol, peer, prefix: of its peer.  since: on any clock.

    end: called when the stream has to go.
    """

    protocol: str
    peer: str
    prefix: str
    since: float
    end: Callable[[], None]


@dataclass(slots=True)
class Libp2pStreams:
    """The streams that are served, with their shares by protocol, network prefix and peer."""

    limits: Limits
    _streams: list[ServedStream] = field(default_factory=list)  # the oldest first

    def enter(self, stream: ServedStream) -> bool:
        """Count a stream until `leave`; False where there is no place for it."""
        others = [each for each in self._streams if each.protocol == stream.protocol]
        own = sum(each.peer == stream.peer for each in others)
        if own >= self.limits.max_libp2p_streams_per_peer:
            return False
        if len(others) >= self.limits.max_libp2p_streams:
            victim = _to_end(others, stream)
            if victim is None:
                return False
            self._streams.remove(victim)
            victim.end()
        self._streams.append(stream)
        return True

    def leave(self, stream: ServedStream) -> None:
        """Count a stream no more.  Twice does no harm."""
        if stream in self._streams:
            self._streams.remove(stream)


def _to_end(streams: Sequence[ServedStream], newcomer: ServedStream) -> ServedStream | None:
    """The oldest of those that hold more than the newcomer would, or of all if it took long."""
    shares = Shares((each.prefix, each.peer) for each in streams)
    largest = max(streams, key=lambda each: shares.rank(each.prefix, each.peer))
    own = shares.rank(newcomer.prefix, newcomer.peer)
    for held, ours in zip(shares.rank(largest.prefix, largest.peer), own, strict=True):
        if held > ours + 1:
            return largest
        if held > ours:
            break
    return streams[0] if newcomer.since - streams[0].since >= LONG_SECONDS else None
