"""A network in memory: connections between named participants, as TCP and a muxer show them.

Everything is reckoned in times of arrival.  A frame arrives after the time of its size at the pair's
bandwidth, a delay, and jitter; a lost frame comes later, and all frames behind it on the connection with it.
While the way is silent (a link is down, a host gone, a process frozen) nothing arrives and neither end is
told; frames under way come when the way is open again.  The kernel gives a connection up when its packets
are not acknowledged for 10 s, or after 20 s without a packet (TCP_USER_TIMEOUT, keepalive); the
other end learns of that once packets pass again.

The real `FramedStream` runs over an `End`.
"""

from __future__ import annotations

import math
import random
import zlib
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import trio

from node.network.streams import FramedStream
from routing.names import PeerId
from tensor_codec.errors import PeerGone, SlowPeer
from tensor_codec.limits import Limits
from tests.sim.plan import Plan

KEEPALIVE_SECONDS = 20.0  # without a word until a connection is given up: 10 s idle and 10 s of probes
MIN_DELAY, MAX_DELAY = 0.001, 0.08  # seconds one way, by distance
LATE_SECONDS = (0.2, 1.5)  # the delay of a lost packet


class Participant(Protocol):
    """A host with a name in the network."""

    alive: bool
    vanished: bool  # not even a kernel answers

    def accept(self, end: End) -> None:
        """A stream comes in, after the delay of the way."""


@dataclass(slots=True)
class Way:
    """From one participant to another.  Times are on the run's clock.

    unreachable_until: no new connection can be made this way until then.
    """

    delay: float
    loss: float
    silent_until: float = -math.inf
    unreachable_until: float = -math.inf
    free_at: float = -math.inf


class Connection:
    """Between two participants.  broken: when each end knows, or will know, that it is over."""

    def __init__(self, network: Network, one: PeerId, other: PeerId) -> None:
        self.network = network
        self.broken = {one: math.inf, other: math.inf}
        self.last_arrival = {one: -math.inf, other: -math.inf}  # by sender
        self.ends: list[End] = []
        self.can_send_now = True  # no end waits for its socket

    def far(self, me: PeerId) -> PeerId:
        """The other one."""
        return next(name for name in self.broken if name != me)

    def break_at(self, me: PeerId, at: float) -> None:
        """My end is over at `at`; the other learns of it when a packet gets through."""
        if at >= self.broken[me]:
            return
        self.broken[me] = at
        far, network = self.far(me), self.network
        heard = max(at, network.silent_until(me, far)) + network.way(me, far).delay
        self.broken[far] = min(self.broken[far], heard)
        for end in self.ends:
            end.wake()


@dataclass(slots=True, eq=False)
class End:
    """One end of a stream, with the methods of a muxed stream that FramedStream uses.

    inbox: (time of arrival, bytes) in order; b"" is the end, None a reset.
    closed: this side has let go of it.
    """

    network: Network
    connection: Connection
    me: PeerId
    peer: PeerId
    protocol: str
    inbox: deque[tuple[float, bytes | None]] = field(default_factory=deque)
    unread: int = 0
    closed: bool = False
    ended: bool = False
    gone_at: float = math.inf  # the other side has let go of the stream, and we hear of it
    _changed: trio.Event | None = None  # while a task waits here
    other: End = field(init=False)

    @property
    def broken_at(self) -> float:
        """When this side sees that the stream is no more: not while its process is frozen."""
        at = min(self.connection.broken[self.me], self.gone_at)
        return max(at, self.network.frozen_until(self.me))

    def wake(self) -> None:
        """The tasks that wait here look again."""
        if self._changed is not None:
            self._changed.set()
            self._changed = None

    async def _wait_until(self, at: float) -> None:
        """Return when something has changed here, or at that time."""
        if self._changed is None:
            self._changed = trio.Event()
        changed = self._changed
        if at == math.inf:
            await changed.wait()
        else:
            with trio.move_on_at(at):
                await changed.wait()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """The next bytes; b"" at the end.  Raises BrokenResourceError, ClosedResourceError."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            if self.closed:
                raise trio.ClosedResourceError("closed on this side")
            if self.ended:
                return b""
            now, ready = self.network.now(), self._ready()
            if ready <= now:
                return self._take()
            broken = self.broken_at
            if broken <= now:
                raise trio.BrokenResourceError("the connection broke")
            await self._wait_until(min(ready, broken))

    def _ready(self) -> float:
        """When the first that is under way is here, as far as is known now."""
        if not self.inbox:
            return math.inf
        at, broken = self.inbox[0][0], self.connection.broken
        silent = self.network.silent_until(self.peer, self.me)
        if silent > at and broken[self.peer] <= silent:
            return math.inf  # given up before it could be sent again
        at = max(at, silent, self.network.frozen_until(self.me))
        return at if at < broken[self.me] else math.inf

    def _take(self) -> bytes:
        data = self.inbox.popleft()[1]
        if data is None:
            self.gone_at = self.network.now()
            raise trio.BrokenResourceError("the peer reset the stream")
        self.unread -= len(data)
        self.ended = not data
        self.other.wake()
        return data

    def send_now(self, data: bytes) -> bool:
        """Send if there is room."""
        if self.closed or self.broken_at <= self.network.now() or self._is_full():
            return False
        self._post(data)
        return True

    async def send_all(self, data: bytes) -> None:
        """Send, waiting for room.  Raises BrokenResourceError, ClosedResourceError."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            if self.closed:
                raise trio.ClosedResourceError("closed on this side")
            if self.broken_at <= self.network.now():
                raise trio.BrokenResourceError("the connection broke")
            if not self._is_full():
                return self._post(data)
            await self._wait_until(self.broken_at)

    def _is_full(self) -> bool:
        return self.other.unread >= self.network.window

    async def send_eof(self) -> None:
        """End this side."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._post(b"")

    async def aclose(self) -> None:
        """End this side, and want nothing more."""
        if not self.closed:
            self._post(b"")
            self._let_go()
        await trio.lowlevel.checkpoint_if_cancelled()

    def reset_now(self) -> None:
        """End both sides."""
        if not self.closed:
            self._post(None)
            self._let_go()

    def _let_go(self) -> None:
        self.closed = True
        self.wake()
        self.connection.ends.remove(self)

    def vanish(self) -> None:
        """The process is gone: nothing is said."""
        if not self.closed:
            self._let_go()

    def _post(self, data: bytes | None) -> None:
        if self.broken_at <= self.network.now():
            return  # it reaches no end
        size = len(data or b"")
        at = self.network.arrival(self.connection, self.me, self.peer, size)
        if self.other.closed or self.connection.broken[self.peer] <= at:
            if data:  # data for a closed end is answered by a reset
                heard = max(at, self.network.mute_until(self.me, self.peer))
                self.gone_at = min(self.gone_at, heard + self.network.way(self.peer, self.me).delay)
                self.wake()
            return
        self.other.inbox.append((at, data))
        self.other.unread += size
        self.other.wake()


class Network:
    """All ways and connections.  trace: a checksum over everything that was ever sent, and when.

    now: the time of the run, asked for at every step.
    """

    def __init__(self, plan: Plan, limits: Limits, rng: random.Random) -> None:
        self.limits = limits
        self.now = trio.lowlevel.current_clock().current_time
        self.window = plan.window
        self.participants: dict[PeerId, Participant] = {}
        self.connections: dict[frozenset[PeerId], Connection] = {}
        self.ends: list[End] = []  # all that were not let go when last looked at
        self.trace = 0
        self.frames = 0
        self._plan = plan
        self._rng = rng
        self._ways: dict[tuple[PeerId, PeerId], Way] = {}
        self._frozen: dict[PeerId, float] = {}
        self._places = {PeerId(each.name): each.place for each in plan.nodes}
        self._places |= {PeerId(each.name): each.place for each in plan.clients}

    # --- conditions -----------------------------------------------------------------------------------

    def way(self, one: PeerId, other: PeerId) -> Way:
        """The way from one to the other."""
        way = self._ways.get((one, other))
        if way is None:
            distance = math.dist(self._places[one], self._places[other]) / math.sqrt(2)
            delay = MIN_DELAY + distance * (MAX_DELAY - MIN_DELAY)
            way = self._ways[one, other] = Way(delay, self._plan.loss)
        return way

    def frozen_until(self, name: PeerId) -> float:
        """Until when its process does nothing."""
        return self._frozen.get(name, -math.inf)

    def silent_until(self, one: PeerId, other: PeerId) -> float:
        """Until when nothing arrives this way."""
        return math.inf if self.participants[one].vanished else self.way(one, other).silent_until

    def mute_until(self, one: PeerId, other: PeerId) -> float:
        """Until when one hears no answer of the other: TCP needs both ways."""
        return max(self.silent_until(one, other), self.silent_until(other, one))

    def passes(self, one: PeerId, other: PeerId) -> bool:
        """Whether both are there, and the other hears now what the one says."""
        now, people, frozen = self.now(), self.participants, self._frozen
        return (
            people[one].alive
            and people[other].alive
            and frozen.get(one, now) <= now
            and frozen.get(other, now) <= now
            and self.silent_until(one, other) <= now
        )

    def freeze(self, name: PeerId, seconds: float) -> None:
        """Stop a process, as SIGSTOP does; its kernel goes on."""
        self._frozen[name] = max(self.frozen_until(name), self.now() + seconds)

    def silence(self, one: PeerId, other: PeerId, seconds: float) -> None:
        """Let nothing through this way for a while."""
        now = self.now()
        way = self.way(one, other)
        way.silent_until = max(way.silent_until, now + seconds)
        if seconds > KEEPALIVE_SECONDS and (connection := self._connection(one, other)):
            connection.break_at(one, now + KEEPALIVE_SECONDS)
            connection.break_at(other, now + KEEPALIVE_SECONDS)

    def cut(self, one: PeerId, other: PeerId) -> None:
        """Reset the connection between two, if there is one."""
        if connection := self._connection(one, other):
            connection.break_at(one, self.now())
            connection.break_at(other, self.now())

    def gone(self, name: PeerId, *, vanished: bool) -> None:
        """A process has ended; its kernel tells the others, or has vanished with it."""
        now = self.now()
        for pair, connection in list(self.connections.items()):
            if name in pair:
                if vanished:
                    connection.break_at(connection.far(name), now + KEEPALIVE_SECONDS)
                connection.break_at(name, now)
        for end in self.ends:
            if end.me == name:
                end.vanish()

    # --- traffic --------------------------------------------------------------------------------------

    def arrival(self, connection: Connection, one: PeerId, other: PeerId, size: int) -> float:
        """When bytes that are sent now will be there, if nothing happens."""
        now, way, rng = self.now(), self.way(one, other), self._rng
        begun = max(now, way.free_at, self.frozen_until(one))
        way.free_at = begun + size / self._plan.bytes_per_second
        at = way.free_at + way.delay + rng.random() * self._plan.jitter
        if way.loss and rng.random() < way.loss:
            at += rng.uniform(*LATE_SECONDS)
        at = connection.last_arrival[one] = max(at, connection.last_arrival[one])
        if self.mute_until(one, other) > now + self.limits.tcp_user_timeout_seconds:
            connection.break_at(one, now + self.limits.tcp_user_timeout_seconds)
        self.note(one, other, size)
        return at

    def note(self, *what: object) -> None:
        """Count something that happened in the trace."""
        self.frames += 1
        self.trace = zlib.crc32(repr((self.now(), *what)).encode(), self.trace)

    async def open_stream(self, me: PeerId, to: PeerId, protocol: str, seconds: float) -> FramedStream:
        """Dial, or use the connection that there is.  Raises PeerGone, SlowPeer."""
        await trio.lowlevel.checkpoint()
        with trio.move_on_after(seconds):
            connection = self._connection(me, to) or await self._dial(me, to)
            return self._stream(connection, me, to, protocol)
        raise SlowPeer(f"no connection to {to} within {seconds:g} s")

    def _connection(self, me: PeerId, to: PeerId) -> Connection | None:
        connection = self.connections.get(frozenset((me, to)))
        return connection if connection and self.now() < connection.broken[me] else None

    async def _dial(self, me: PeerId, to: PeerId) -> Connection:
        way = self.way(me, to)
        await trio.sleep(2 * way.delay)
        if self.now() < way.unreachable_until:
            raise PeerGone(f"{to} cannot be reached: no route")
        while (  # noqa: ASYNC110  it may be blocked for longer meanwhile
            blocked := max(self.mute_until(me, to), self.frozen_until(to))
        ) > self.now():
            await trio.sleep_until(blocked)
        if not self._is_up(to):
            raise PeerGone(f"{to} cannot be reached: connection refused")
        await trio.sleep(2 * way.delay)
        connection = self._connection(me, to)
        if connection is None:
            connection = self.connections[frozenset((me, to))] = Connection(self, me, to)
            if not self._is_up(to):
                connection.break_at(to, self.now())
        return connection

    def _is_up(self, name: PeerId) -> bool:
        return self.participants[name].alive

    def _stream(self, connection: Connection, me: PeerId, to: PeerId, protocol: str) -> FramedStream:
        near, far = (End(self, connection, one, other, protocol) for one, other in ((me, to), (to, me)))
        near.other, far.other = far, near
        self.ends = [end for end in self.ends if not end.closed]
        for end in (near, far):
            connection.ends.append(end)
            self.ends.append(end)
        at = self.arrival(connection, me, to, len(protocol))
        if connection.broken[to] <= at or not self._is_up(to):
            far.vanish()
            near.gone_at = max(at, self.mute_until(me, to)) + self.way(to, me).delay
        else:
            self.participants[to].accept(far)
        return FramedStream(near, to, protocol, self.limits)

    async def until_here(self, end: End) -> None:
        """Wait until the first packet of a stream that comes in is here."""
        at = self.now() + self.way(end.peer, end.me).delay
        while self.now() < at:
            await trio.sleep_until(at)
            at = max(at, self.silent_until(end.peer, end.me), self.frozen_until(end.me))
            if at == math.inf:
                return

    def lingering(self, names: Iterable[PeerId]) -> list[str]:
        """Streams that these have not let go of."""
        wanted = set(names)
        return [
            f"{end.me} -> {end.peer} {end.protocol}"
            for end in self.ends
            if end.me in wanted and not end.closed
        ]


@dataclass(frozen=True, slots=True)
class Host:
    """The network of a client or server: the part of `node.network.host.Host` that they use."""

    network: Network
    me: PeerId

    async def open_stream(
        self, peer: PeerId, addresses: object, protocol: str, *, seconds: float | None = None
    ) -> FramedStream:
        """See node.network.host."""
        limit = self.network.limits.dial_seconds if seconds is None else seconds
        return await self.network.open_stream(self.me, peer, protocol, limit)
