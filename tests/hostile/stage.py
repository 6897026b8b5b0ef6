"""What an attack works with: its target, its identities and addresses, and the signal to begin."""

from __future__ import annotations

import json
import secrets
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from node.network.host import open_host
from node.network.peer_info import ask_for_info
from node.network.transport.identity import Identity, identity_of
from routing.names import PeerId
from tensor_codec.blocks import Blocks
from tensor_codec.errors import PeerFault, Refused
from tensor_codec.messages.info import INFO_PROTOCOL, PeerInfo
from tensor_codec.messages.session import Open
from tensor_codec.span_spec import SpanSpec
from tests.hostile.talking import say

TURNED_AWAY = (PeerFault, Refused, OSError, trio.BrokenResourceError, trio.ClosedResourceError)
PAUSE_SECONDS = 0.02  # after a try that was turned away: an attacker that spins only hurts itself


@dataclass(frozen=True, slots=True)
class Target:
    """A node: its multiaddr with /p2p/ID, taken apart.  Only loopback addresses are taken."""

    address: str
    host: str
    port: int
    peer: PeerId

    @property
    def where(self) -> tuple[str, ...]:
        """Its addresses, without the id."""
        return (self.address.partition("/p2p/")[0],)


def target_of(address: str) -> Target:
    """Raises ValueError for an address that is not this machine's own: nobody else is attacked."""
    _, _, host, _, port, _, peer = address.split("/")
    with socket.socket() as probe:
        try:
            probe.bind((host, 0))  # only an address of this machine can be taken
        except OSError:
            raise ValueError(f"{address} is not on this machine") from None
    return Target(address, host, int(port), PeerId(peer))


@dataclass(slots=True)
class Stage:
    """One attack under way.

    targets: the nodes of the swarm; most attacks take the first.  sources: the addresses that the attacker
    comes from; "" for that of honest peers.  third: a third party's address, which is this machine's too.
    got: what the attacker counts.  facts: values to say at the end besides these.
    """

    targets: tuple[Target, ...]
    sources: tuple[str, ...]
    seconds: float
    third: str = "127.0.0.99"
    got: Counter[str] = field(default_factory=Counter)
    facts: dict[str, Any] = field(default_factory=dict)  # Any: JSON
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    told: bool = True  # when to begin, on standard input; else it begins when it is ready
    began: float | None = None
    _cpu: float = 0.0
    _turn: int = 0

    @property
    def target(self) -> Target:
        """The first node."""
        return self.targets[0]

    def source(self) -> str:
        """The next address to come from, in turn."""
        self._turn += 1
        return self.sources[self._turn % len(self.sources)]

    async def ready(self) -> None:
        """Say that everything is prepared, and wait for the signal; `seconds` count from it."""
        if self.told:
            say(ready=True)
            await trio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
        self.scope.deadline = trio.current_time() + self.seconds
        self.began, self._cpu = time.monotonic(), time.process_time()
        if self.told:
            say(began=self.began)

    def over(self) -> None:
        """Say what was done, and what it cost."""
        cpu = time.process_time() - self._cpu
        self.facts["seconds"] = round(time.monotonic() - (self.began or time.monotonic()), 1)
        say(over=time.monotonic(), cpu=cpu, got=dict(self.got), facts=json.loads(json.dumps(self.facts)))

    async def again_and_again(self, act: Callable[[], Awaitable[None]]) -> None:
        """Repeat an act until the end; the target turning it away is counted."""
        while True:
            try:
                await act()
            except TURNED_AWAY as error:
                self.got[f"turned away: {type(error).__name__}"] += 1
                await trio.sleep(PAUSE_SECONDS)
            except BaseExceptionGroup as group:
                faults, others = group.split(TURNED_AWAY)
                if others is not None:
                    raise others from None
                self.got["turned away"] += 1 if faults else 0
                await trio.sleep(PAUSE_SECONDS)

    async def at_once(self, number: int, act: Callable[[], Awaitable[None]]) -> None:
        """So many tasks that each repeat an act until the end."""
        async with trio.open_nursery() as nursery:
            for _ in range(number):
                nursery.start_soon(self.again_and_again, act)


def new_identity() -> Identity:
    """A throw-away one: it costs nothing."""
    return identity_of(secrets.token_bytes(32))


async def served_by(target: Target) -> PeerInfo:
    """What a node serves, by its own word."""
    async with open_host(identity=new_identity(), listen=[]) as host:
        stream = await host.open_stream(target.peer, target.where, INFO_PROTOCOL, seconds=10.0)
        return await ask_for_info(stream, 10.0)


def spec_of(info: PeerInfo) -> SpanSpec:
    """All blocks that a node serves, as a client asks for them."""
    return SpanSpec(info.model, info.revision, Blocks(info.start, info.stop), info.dtype)


def opening(spec: SpanSpec, max_length: int, **more: Any) -> Open:  # Any: fields of Open
    """A session of one row under a new id."""
    return Open(secrets.token_bytes(16), spec, 1, max_length, "fp32", **more)
