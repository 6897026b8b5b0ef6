"""The sessions that are open at this node, and those that ended a moment ago."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import trio

from node.serving.sessions.hop_session import FrameStream, HopSession, SessionKey
from node.serving.sessions.moving.client_stream import ClientStream
from tensor_codec.errors import PeerGone, Refused
from tensor_codec.messages.attach import Attach
from tensor_codec.messages.fields import Failed, encode_failed
from tensor_codec.messages.session import owner_tag

REMEMBERED_SECONDS = 60.0  # a step that travels longer is late by any measure
MAX_REMEMBERED = 4096
STEPS_FORGIVEN = 64  # of one session: those in flight, and parts of a replay


@dataclass(slots=True, eq=False)
class Place:
    """A session, from the moment that it waits for pages.

    epoch: of the route at its opening.  refusal: why it was not opened in the end.
    """

    epoch: int
    opening: trio.CancelScope = field(default_factory=trio.CancelScope)
    refusal: Refused | None = None

    def refuse(self, refusal: Refused) -> None:
        """End the opening."""
        self.refusal = refusal
        self.opening.cancel()


@dataclass(slots=True)
class EndedSessions:
    """Forgives steps that a feeder sent before it knew of the end.  Times are the caller's clock, in seconds.

    Bounded: at most MAX_REMEMBERED sessions, the oldest go first.
    """

    _left: dict[tuple[str, bytes], tuple[int, float]] = field(default_factory=dict)

    def add(self, feeder: str, session: bytes, now: float) -> None:
        """A session has ended that this peer fed."""
        self._left.pop((feeder, session), None)
        if len(self._left) >= MAX_REMEMBERED:
            del self._left[next(iter(self._left))]
        self._left[feeder, session] = STEPS_FORGIVEN, now

    def forgives(self, feeder: str, session: bytes, now: float) -> bool:
        """Whether a step of this session may still come from this peer; it counts as one of those."""
        left, since = self._left.get((feeder, session), (0, now))
        if not left or now - since > REMEMBERED_SECONDS:
            self._left.pop((feeder, session), None)
            return False
        self._left[feeder, session] = left - 1, since
        return True


@dataclass(slots=True)
class SessionTable:
    """The open sessions: by their owner and id, by their id alone, and how many each peer has.

    by_key, by_id: for reading; those under one id are of different owners, the oldest first.
    places: of sessions, those too that wait for pages.  one_ended: set when a place becomes free, and then
    another event.
    """

    by_key: dict[SessionKey, HopSession] = field(default_factory=dict)
    by_id: dict[bytes, list[HopSession]] = field(default_factory=dict)
    places: dict[SessionKey, Place] = field(default_factory=dict)
    ended: EndedSessions = field(default_factory=EndedSessions)
    one_ended: trio.Event = field(default_factory=trio.Event)
    _by_peer: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.by_key)

    def all(self) -> list[HopSession]:
        """All open sessions; a copy."""
        return list(self.by_key.values())

    def count_of(self, peer: str) -> int:
        """Sessions that this peer has open."""
        return self._by_peer[peer]

    def end(self, key: SessionKey, reason: Refused) -> None:
        """End a session, or its opening."""
        if (hop := self.by_key.get(key)) is not None:
            hop.end(reason)
        elif (place := self.places.get(key)) is not None:
            place.refuse(reason)

    async def attach(self, stream: FrameStream, asked: Attach) -> None:
        """Let a client go on with its session over this stream, as long as it does.  Raises PeerFault."""
        hop = self.by_key.get((owner_tag(stream.peer), asked.session))
        if hop is None or hop.scope.cancel_called or not isinstance(hop.stream, ClientStream):
            none = PeerGone("no session of yours that could go on here is open under this id")
            await stream.send(encode_failed(Failed.of(none)))
        else:
            await hop.stream.follow(stream)

    def free(self, key: SessionKey) -> None:
        """Give the place of a session back that has ended, or that never began."""
        del self.places[key]
        self.one_ended.set()
        self.one_ended = trio.Event()

    @contextmanager
    def holding(self, hop: HopSession) -> Iterator[None]:
        """The session is open within the context."""
        peer, session = hop.stream.peer, hop.contract.session
        self.by_key[hop.key] = hop
        self.by_id.setdefault(session, []).append(hop)
        self._by_peer[peer] += 1
        try:
            yield
        finally:
            self.ended.add(hop.feeder, session, trio.current_time())
            del self.by_key[hop.key]
            self.by_id[session].remove(hop)
            if not self.by_id[session]:
                del self.by_id[session]
            self._by_peer[peer] -= 1
            if not self._by_peer[peer]:
                del self._by_peer[peer]
