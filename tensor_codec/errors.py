"""All errors of talking to a peer, sorted by the action that they call for.

* `PeerFault`: the peer was wrong, slow or gone.  The caller drops the stream and tries another peer.
* `Refused`: a peer, or this node, refused politely.  The caller tries another peer, or waits.
* `LocalProtocolError`: a bug of this process.  Nothing catches it.

`routing.chains.hops.NoChain` (the swarm cannot serve this now) and `node.config.ConfigError` (the operator
must fix something) are defined next to the code that raises them.
"""

from __future__ import annotations

from typing import ClassVar


class PeerFault(Exception):
    """A peer did something wrong, was too slow, or went away.

    peer: the peer at fault, where known.
    may_be_the_network: an honest peer's bad network looks the same, so such faults ban nobody.
    is_grave: no honest peer does it, so one such fault bans.
    """

    peer: str | None = None
    may_be_the_network: ClassVar[bool] = False
    is_grave: ClassVar[bool] = False

    def about(self, peer: str) -> None:
        """Name the peer, where nobody has named one."""
        self.peer = self.peer or peer


class FrameError(PeerFault):
    """The bytes are not a whole frame within the limits."""


class MessageError(PeerFault):
    """The frame is whole but its content is not a message that the contract allows."""


class ForgedContent(MessageError):
    """Bytes that are not those whose hash the same peer has stated: no network changes a bit of them."""

    is_grave = True


class RemoteProtocolError(PeerFault):
    """A well-formed message that is not allowed at this moment."""


class SlowPeer(PeerFault):
    """A deadline passed; the message says which and how long it was."""

    may_be_the_network = True


class PeerGone(PeerFault):
    """The connection or the stream is closed, reset, or could not be made."""

    may_be_the_network = True


class BadResult(PeerFault):
    """A peer answered with values that cannot be right (NaN, wrong shape, wrong size)."""


class NotAMember(PeerFault):
    """The peer could not prove that it holds our swarm key, or does not accept that we do."""

    may_be_the_network = True


class Refused(Exception):
    """A polite refusal.

    retry_after_seconds: when asking again may help, or None where it will not.
    peer: the refusing peer, where known.
    """

    peer: str | None = None

    code = "refused"

    def __init__(self, message: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds

    def about(self, peer: str) -> None:
        """Name the peer, where nobody has named one."""
        self.peer = self.peer or peer


class CacheFull(Refused):
    """No room for the cache that the session asks for."""

    code = "cache_full"


class TooManyStreams(Refused):
    """A cap on streams, sessions or waiting steps is reached."""

    code = "too_many"


class WrongRevision(Refused):
    """Another model, revision, dtype or span than the one this peer serves."""

    code = "wrong_revision"


class Draining(Refused):
    """The peer is leaving and takes no new session."""

    code = "draining"


class NoTape(Refused):
    """The peer no longer has the graph of a forward: it computes it again from the hidden states."""

    code = "no_tape"


class NoAdapter(Refused):
    """The peer does not hold the adapter that was named: bring it, and ask the same peer again."""

    code = "no_adapter"


class LocalProtocolError(Exception):
    """We broke our own protocol: a bug, never a peer's doing."""


REFUSALS: dict[str, type[Refused]] = {
    kind.code: kind
    for kind in (Refused, CacheFull, TooManyStreams, WrongRevision, Draining, NoTape, NoAdapter)
}
