"""Races several addresses of one peer: each starts a moment after the last, and the first success wins.

One dead address must not hide a peer that can be reached at another.  An address whose packets vanish
delays the others only for a moment, as in Happy Eyeballs (RFC 8305) and trio's `open_tcp_stream`.  A TCP
connection does not end the race: another machine with the same private address may have answered.  An attempt
has succeeded when the peer has proved its id.
"""

from __future__ import annotations

import contextlib
import math
import socket
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import trio

from node.network.addresses import Address, dial_order
from tensor_codec.errors import NotAMember, PeerFault, PeerGone, SlowPeer

STAGGER_SECONDS = 0.25  # until the next address is tried too; RFC 8305, section 8
TRIED_AT_ONCE = 4
TURN_SECONDS = 1.0  # after which an untried address replaces an address without an answer
_IPV6_ADDR_PREFERENCES, _IPV6_PREFER_SRC_PUBLIC = 72, 0x0002  # linux/in6.h; Python's socket lacks them
MAX_ANSWERS = 8  # addresses of one name that are tried

T = TypeVar("T")


@dataclass(slots=True)
class Race(Generic[T]):
    """Tries addresses until one succeeds.  The caller sets the deadline.

    attempt: connects to an IP address and proves the peer's id.  Raises PeerFault.
    resolve: the IP addresses of a name.  Raises PeerFault.
    discard: called with each late result.
    failures: the fault of each address, in order of time; may be read at any time.
    unanswered: addresses under trial; may be read at any time, also after a cancelled race.
    """

    attempt: Callable[[Address], Awaitable[T]]
    resolve: Callable[[Address], Awaitable[Sequence[Address]]]
    discard: Callable[[T], object]
    failures: list[tuple[Address, PeerFault]] = field(default_factory=list)
    unanswered: list[Address] = field(default_factory=list)
    _tried: dict[Address, tuple[float, trio.CancelScope]] = field(default_factory=dict)  # its start
    _left: deque[Address] = field(default_factory=deque)
    _seen: set[Address] = field(default_factory=set)
    _won: list[T] = field(default_factory=list)
    _ended: trio.Event = field(default_factory=trio.Event)  # an attempt

    async def run(self, addresses: Sequence[Address]) -> T | None:
        """The result of the first successful attempt, the others cancelled; None where all failed."""
        self._queue(addresses)
        try:
            async with trio.open_nursery() as nursery:
                while self._left or self._tried:
                    if self._left and len(self._tried) < TRIED_AT_ONCE:
                        nursery.start_soon(self._try, self._left.popleft(), nursery.cancel_scope)
                        await trio.lowlevel.checkpoint()
                    await self._until_it_is_time()
        except BaseException:
            self._throw_away()  # cancelled at the moment of its success
            raise
        return self._won[0] if self._won else None

    def _queue(self, addresses: Sequence[Address]) -> None:
        """Put these addresses before the waiting ones."""
        new = [address for address in dial_order(addresses) if address not in self._seen]
        self._seen.update(new)
        self._left.extendleft(reversed(new))

    async def _until_it_is_time(self) -> None:
        """Wait for the end of an attempt, or for the time of the next address."""
        full = len(self._tried) >= TRIED_AT_ONCE
        seconds = STAGGER_SECONDS if self._left else math.inf
        if self._left and full:
            since, oldest = next(iter(self._tried.values()))
            seconds = max(0.0, since + TURN_SECONDS - trio.current_time())
        with trio.move_on_after(seconds) as waiting:
            await self._ended.wait()
        self._ended = trio.Event()
        if waiting.cancelled_caught and full:
            oldest.cancel()
            await self._ended.wait()

    async def _try(self, address: Address, race: trio.CancelScope) -> None:
        scope = trio.CancelScope()
        self._tried[address] = trio.current_time(), scope
        self.unanswered.append(address)
        try:
            with scope:
                if address.kind not in ("ip4", "ip6"):
                    self._queue((await self.resolve(address))[:MAX_ANSWERS])
                else:
                    self._won.append(await self.attempt(address))
                    race.cancel()
                self.unanswered.remove(address)
            if scope.cancelled_caught:
                self.unanswered.remove(address)
                self.failures.append((address, SlowPeer(f"no answer within {TURN_SECONDS:g} s")))
        except PeerFault as fault:
            self.unanswered.remove(address)
            self.failures.append((address, fault))
        finally:
            del self._tried[address]
            self._ended.set()
            self._throw_away(but=1)

    def _throw_away(self, but: int = 0) -> None:
        """Discard surplus results: two attempts may succeed at the same moment."""
        while len(self._won) > but:
            self.discard(self._won.pop())


async def first_of(attempts: Sequence[Callable[[], Awaitable[T]]], head_starts: Sequence[float]) -> T:
    """The result of the first attempt that succeeds, the others cancelled.

    head_starts: seconds that each attempt has before the next one begins; its failure ends them.
    Raises the fault of the first attempt, with those of the others in its text, PeerGone where there is none.
    """
    results: list[T] = []
    faults: list[PeerFault] = []

    async def run(attempt: Callable[[], Awaitable[T]], failed: trio.Event) -> None:
        try:
            results.append(await attempt())
        except PeerFault as fault:
            faults.append(fault)
            failed.set()
        else:
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for attempt, seconds in zip(attempts, head_starts, strict=False):
            failed = trio.Event()
            nursery.start_soon(run, attempt, failed)
            with trio.move_on_after(seconds):
                await failed.wait()
    if results:
        return results[0]
    for fault in faults:
        if isinstance(fault, NotAMember):  # the operator should read this one first
            raise fault
    if not faults:
        raise PeerGone("neither an address nor a relay is known")
    kind = type(faults[0]) if isinstance(faults[0], PeerGone | SlowPeer) else PeerGone
    raise kind("; ".join(map(str, faults))) from faults[0]


async def resolve(address: Address) -> list[Address]:
    """The present IP addresses of a name: one family for dns4 and dns6, both for dns.  Raises PeerGone."""
    families = {"dns4": socket.AF_INET, "dns6": socket.AF_INET6}
    family = families.get(address.kind, socket.AF_UNSPEC)
    try:
        found = await trio.socket.getaddrinfo(address.host, address.port, family, socket.SOCK_STREAM)
    except OSError as error:
        raise PeerGone(f"{address.host} has no address: {error.strerror or error}") from error
    addresses = [
        Address("ip6" if kind == socket.AF_INET6 else "ip4", str(name[0]), address.port)
        for kind, _, _, _, name in found
        if kind in (socket.AF_INET, socket.AF_INET6) and "%" not in str(name[0])
    ]
    if not addresses:
        raise PeerGone(f"{address.host} has no address that can be dialled")
    return addresses


async def open_tcp(address: Address) -> trio.SocketStream:
    """Connect to an IP address.  Raises PeerGone."""
    try:
        if address.kind == "ip6":
            return await _open_tcp6(address)
        return await trio.open_tcp_stream(address.host, address.port)
    except OSError as error:
        cause: BaseException = error.__cause__ or error
        while isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        raise PeerGone(getattr(cause, "strerror", None) or str(cause)) from error


async def _open_tcp6(address: Address) -> trio.SocketStream:
    """As `trio.open_tcp_stream`, from this machine's lasting address: peers see the one that it announces."""
    dialled = trio.socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    try:
        prefer_lasting_address(dialled)
        await dialled.connect((address.host, address.port))
    except BaseException:
        dialled.close()
        raise
    return trio.SocketStream(dialled)


def prefer_lasting_address(dialled: trio.socket.SocketType) -> None:
    """Leave by the lasting IPv6 address and not by a temporary one, where the system can (RFC 5014)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            dialled.setsockopt(socket.IPPROTO_IPV6, _IPV6_ADDR_PREFERENCES, _IPV6_PREFER_SRC_PUBLIC)
