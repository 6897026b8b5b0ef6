"""Keeps the ports of this node forwarded, as `MappingPlan` decides, and has them forgotten at the end."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import trio

from node.network.mapping.nat_pmp import NatPmp
from node.network.mapping.plan import (
    METHODS,
    Ask,
    ExtraAddress,
    Forwarding,
    MappingError,
    MappingPlan,
    Method,
    Release,
    Wait,
    ports_to_map,
)
from node.network.mapping.upnp import Upnp
from node.runtime.nurseries import background_nursery

log = logging.getLogger(__name__)

Offer = Callable[[Method, Sequence[str]], None]

ASK_SECONDS = 10.0  # of one request: UPnP is a search of a second and four exchanges over HTTP
ADDRESSES_SECONDS = 10.0  # between looks at the addresses of this machine, which costs nothing
RELEASE_SECONDS = 1.0  # for all ports at the end; a lease ends the others
NAMES: Mapping[Method, str] = {"nat-pmp": "NAT-PMP", "upnp": "UPnP"}


class Gateway(Protocol):
    """A way of asking the router."""

    async def forward(self, ask: Ask) -> Forwarding:
        """Have a port forwarded.  Raises MappingError."""

    async def release(self, forwarding: Forwarding) -> None:
        """Have a port forgotten.  Raises MappingError."""


class PortMapper:
    """The forwarded ports of this node.  Made by `open_mapper`.

    listening: the multiaddrs on which this node listens now.  offer, peer: see `open_mapper`.
    """

    def __init__(
        self,
        listening: Callable[[], Sequence[str]],
        offer: Offer,
        gateways: Mapping[Method, Gateway],
        peer: str,
    ) -> None:
        self._peer = peer
        self._listening = listening
        self._offer = offer
        self._gateways = gateways
        self._plan = MappingPlan()
        self._wake = trio.Event()
        self._extra: tuple[ExtraAddress, ...] = ()
        self._said: str | None = None  # the last reason in the log

    @property
    def extra(self) -> tuple[ExtraAddress, ...]:
        """Addresses that may lead to this node from outside.  No peer has verified them."""
        return self._extra

    def look_again(self) -> None:
        """Ask the router now: a dial from outside has failed, or this machine was asleep."""
        self._plan.look_again(trio.current_time())
        self._wake.set()

    async def run(self) -> None:
        """Ask the router again and again."""
        while True:
            self._plan.set_ports(ports_to_map(self._listening()), trio.current_time())
            match self._plan.next(trio.current_time()):
                case Ask() as ask:
                    await self._ask(ask)
                case Release(forwarding):
                    with trio.move_on_after(ASK_SECONDS):
                        await self._release(forwarding)
                case Wait(seconds):
                    self._tell()
                    with trio.move_on_after(min(seconds, ADDRESSES_SECONDS)):
                        await self._wake.wait()
                    self._wake = trio.Event()

    async def _ask(self, ask: Ask) -> None:
        try:
            with trio.fail_after(ASK_SECONDS):
                forwarding = await self._gateways[ask.method].forward(ask)
        except MappingError as error:
            self._plan.refused(ask, str(error), trio.current_time())
        except trio.TooSlowError:
            why = f"{NAMES[ask.method]}: no answer within {ASK_SECONDS:g} s"
            self._plan.refused(ask, why, trio.current_time())
        else:
            self._plan.granted(ask, forwarding, trio.current_time())

    async def _release(self, forwarding: Forwarding) -> None:
        try:
            await self._gateways[forwarding.method].release(forwarding)
        except MappingError as error:
            log.debug("port %d of the router stays until its lease ends: %s", forwarding.outside_port, error)

    def _tell(self) -> None:
        """Offer and log what has changed."""
        extra = self._plan.extra()
        if extra != self._extra:
            for address, origin in extra:
                if (address, origin) not in self._extra:
                    where = f"{address}/p2p/{self._peer}"
                    log.info("the router forwards %s to this node (%s)", where, NAMES[origin])
            self._extra = extra
            for method in METHODS:
                self._offer(method, [str(address) for address, origin in extra if origin == method])
        why = "; ".join(dict.fromkeys(self._plan.refusals.values())) if not extra else None
        if why and why != self._said:
            log.info("no router forwards a port to this node: %s", why)
        self._said = why

    async def close(self) -> None:
        """Have the router forget all ports: within RELEASE_SECONDS, or at the end of their leases."""
        with trio.CancelScope(shield=True), trio.move_on_after(RELEASE_SECONDS):
            async with trio.open_nursery() as nursery:
                for forwarding in self._plan.releases():
                    nursery.start_soon(self._release, forwarding)


@asynccontextmanager
async def open_mapper(
    listening: Callable[[], Sequence[str]],
    offer: Offer,
    gateways: Mapping[Method, Gateway] | None = None,
    *,
    peer: str,
) -> AsyncIterator[PortMapper]:
    """Keep the ports of this node forwarded until the end of the block.

    listening: the multiaddrs on which this node listens now.  gateways: in place of this machine's router.
    offer: called with a method and all the multiaddrs that it gives now, whenever these are others.  They are
    to be verified by dials from outside before they are announced.  peer: this node's id, for the log.
    """
    mapper = PortMapper(
        listening, offer, {"nat-pmp": NatPmp(), "upnp": Upnp()} if gateways is None else gateways, peer
    )
    try:
        async with background_nursery() as nursery:
            nursery.start_soon(mapper.run)
            yield mapper
    finally:
        await mapper.close()
