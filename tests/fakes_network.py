"""A network of hosts in one process, over memory: with delays, partitions and deaths, on any clock.

`FakeHost` has the face of `node.network.host.Host`; its streams are real FramedStreams over a byte
stream that delivers after a delay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from node.network.streams import FramedStream
from node.network.transport.identity import Identity, identity_of
from node.runtime.faults import Faults
from routing.names import PeerId
from tensor_codec.errors import PeerFault, PeerGone, SlowPeer
from tensor_codec.limits import Limits

Handler = Callable[[FramedStream], Awaitable[None]]
ByteHandler = Callable[["PipeEnd", PeerId, str], Awaitable[None]]


class DelayedPipe:
    """One direction: bytes come out `delay` seconds after they went in, if nothing breaks it."""

    def __init__(self, delay: float, room: int) -> None:
        self.delay = delay
        self.room = room
        self.waiting: deque[tuple[float, bytes]] = deque()
        self.held = 0
        self.ended = False
        self.broken = False
        self._changed = trio.Event()

    def poke(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def put(self, data: bytes) -> None:
        while self.held >= self.room and not self.broken:
            await self._changed.wait()
        if self.broken:
            raise trio.BrokenResourceError("the link broke")
        await trio.lowlevel.checkpoint()
        self.waiting.append((trio.current_time() + self.delay, data))
        self.held += len(data)
        self.poke()

    async def get(self) -> bytes:
        while True:
            if self.broken:
                raise trio.BrokenResourceError("the link broke")
            if self.waiting:
                due, data = self.waiting[0]
                wait = due - trio.current_time()
                if wait <= 0:
                    self.waiting.popleft()
                    self.held -= len(data)
                    self.poke()
                    await trio.lowlevel.checkpoint()
                    return data
                with trio.move_on_after(wait):
                    await self._changed.wait()
            elif self.ended:
                await trio.lowlevel.checkpoint()
                return b""
            else:
                await self._changed.wait()


class PipeEnd:
    """One end of a pair of pipes: the byte stream under a FramedStream."""

    def __init__(self, out: DelayedPipe, into: DelayedPipe) -> None:
        self.out, self.into = out, into

    async def send_all(self, data: bytes) -> None:
        await self.out.put(data)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return await self.into.get()

    async def send_eof(self) -> None:
        self.out.ended = True
        self.out.poke()
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await self.send_eof()

    def reset_now(self) -> None:
        for pipe in (self.out, self.into):
            pipe.broken = True
            pipe.poke()


class FakeNetwork:
    """Hosts by address, and the state of the links between them."""

    def __init__(self, delay: float = 0.01, room: int = 256 * 1024) -> None:
        self.delay = delay
        self.room = room
        self.hosts: dict[PeerId, FakeHost] = {}
        self.side: dict[PeerId, int] = {}  # hosts of different sides do not reach each other
        self.streams: list[tuple[FakeHost, FakeHost, PipeEnd]] = []
        self.dials: list[tuple[PeerId, PeerId]] = []
        self.black_holes: set[PeerId] = set()  # frames to these peers vanish without an error

    def reachable(self, one: PeerId, other: PeerId) -> bool:
        there = one in self.hosts and other in self.hosts
        return there and self.side.get(one, 0) == self.side.get(other, 0)

    def split(self, *sides: Sequence[PeerId]) -> None:
        """Cut every link between the sides; the streams there break."""
        self.side = {peer: number for number, side in enumerate(sides, 1) for peer in side}
        self._break_streams()

    def heal(self) -> None:
        self.side = {}

    def kill(self, peer: PeerId) -> None:
        """A host is gone without a word."""
        self.hosts.pop(peer).nursery.cancel_scope.cancel()
        self._break_streams()

    def _break_streams(self) -> None:
        for one, other, end in self.streams:
            if not self.reachable(one.peer_id, other.peer_id):
                end.reset_now()
        self.streams = [
            (one, other, end) for one, other, end in self.streams if not (end.out.broken or end.into.broken)
        ]


class FakeHost:
    """A host on a FakeNetwork, with the face of the real one.

    prefix: that others see of its address; "" for a machine of one's own.
    """

    prefix = ""

    def __init__(
        self,
        network: FakeNetwork,
        number: int,
        nursery: trio.Nursery,
        limits: Limits,
        identity: Identity | None = None,
    ) -> None:
        self.identity: Identity = identity or identity_of(number.to_bytes(32, "big"))
        self.peer_id = self.identity.peer_id
        self.addresses: tuple[str, ...] = (f"/ip4/10.0.{number // 250}.{number % 250 + 1}/tcp/4001",)
        self.addresses_of_the_machine = self.addresses
        self.network = network
        self.nursery = nursery
        self.limits = limits
        self.faults = Faults()
        self.handlers: dict[str, Handler] = {}
        self.byte_handlers: dict[str, ByteHandler] = {}
        self.frame_bytes: dict[str, int] = {}
        self.linked: set[PeerId] = set()
        self.configured: set[str] = set()
        network.hosts[self.peer_id] = self

    @property
    def multiaddr(self) -> str:
        return f"{self.addresses[0]}/p2p/{self.peer_id}"

    def read_addresses(self) -> bool:
        before, self.addresses = self.addresses, self.addresses_of_the_machine
        return self.addresses != before

    def handle(self, protocol: str, handler: Handler, *, max_frame_bytes: int | None = None) -> None:
        self.handlers[protocol] = handler
        self.frame_bytes[protocol] = max_frame_bytes or self.limits.max_frame_bytes

    def configure_peers(self, multiaddrs: Iterable[str]) -> None:
        self.configured.update(multiaddrs)

    def sign_of_life(self, names: Iterable[str]) -> None:
        """A dial never waits here."""

    def charge(self, who: str, fault: PeerFault, *, bans: bool = True) -> None:
        self.faults.add(who, fault, bans=bans)

    def handle_bytes(self, protocol: str, handler: ByteHandler) -> None:
        self.byte_handlers[protocol] = handler

    async def open_stream(
        self, peer: PeerId, addresses: Sequence[str], protocol: str, *, seconds: float
    ) -> FramedStream:
        other = await self._reach(peer, addresses)
        if protocol not in other.handlers:
            raise PeerGone(f"{peer} does not speak {protocol}")
        ours, theirs = self._pipes(other)
        served = FramedStream(theirs, self.peer_id, protocol, self.limits, prefix=self.prefix)
        served.limit = other.frame_bytes[protocol]
        other.nursery.start_soon(other._serve, served)
        return FramedStream(ours, peer, protocol, self.limits, prefix=other.prefix)

    async def open_bytes(
        self, peer: PeerId, addresses: Sequence[str], protocol: str, *, seconds: float
    ) -> PipeEnd:
        other = await self._reach(peer, addresses)
        if protocol not in other.byte_handlers:
            raise PeerGone(f"{peer} does not speak {protocol}")
        ours, theirs = self._pipes(other)
        other.nursery.start_soon(other._serve_bytes, theirs, protocol, self)
        return ours

    async def _reach(self, peer: PeerId, addresses: Sequence[str]) -> FakeHost:
        network = self.network
        network.dials.append((self.peer_id, peer))
        await trio.sleep(2 * network.delay)
        if not network.reachable(self.peer_id, peer):
            raise PeerGone(f"{addresses[0]}: no route to host")
        other = network.hosts[peer]
        if not set(addresses) & set(other.addresses) and peer not in self.connected():
            raise PeerGone(f"{addresses[0]}: somebody else listens there")
        self.linked.add(peer)
        other.linked.add(self.peer_id)
        return other

    def _pipes(self, other: FakeHost) -> tuple[PipeEnd, PipeEnd]:
        network = self.network
        there, back = (DelayedPipe(network.delay, network.room) for _ in range(2))
        ours, theirs = PipeEnd(there, back), PipeEnd(back, there)
        network.streams.append((self, other, ours))
        return ours, theirs

    async def _serve_bytes(self, stream: PipeEnd, protocol: str, other: FakeHost) -> None:
        try:
            await self.byte_handlers[protocol](stream, other.peer_id, other.prefix)
            await stream.aclose()
        except PeerFault as fault:
            stream.reset_now()
            self.charge(other.peer_id, fault)

    async def _serve(self, stream: FramedStream) -> None:
        try:
            await self.handlers[stream.protocol](stream)
            await stream.aclose()
        except PeerFault as fault:
            await stream.reset()
            self.charge(stream.peer, fault)

    async def connect(self, peer: PeerId, addresses: Sequence[str], *, seconds: float) -> None:
        await self._vanish(peer, seconds)
        await trio.sleep(2 * self.network.delay)
        if not self.network.reachable(self.peer_id, peer):
            raise PeerGone("no route to host")
        self.linked.add(peer)

    async def _vanish(self, peer: PeerId, seconds: float) -> None:
        if peer in self.network.black_holes and self.peer_id != peer:
            await trio.sleep(seconds)
            raise SlowPeer("not a word")

    def connected(self) -> set[PeerId]:
        return {peer for peer in self.linked if self.network.reachable(self.peer_id, peer)}

    async def ping(self, peer: PeerId, addresses: Sequence[str], *, seconds: float | None = None) -> float:
        await self._vanish(peer, 60.0 if seconds is None else seconds)
        if not self.network.reachable(self.peer_id, peer):
            await trio.sleep(60.0 if seconds is None else seconds)
            raise SlowPeer("no answer to a ping")
        began = trio.current_time()
        await trio.sleep(2 * self.network.delay)
        return trio.current_time() - began
