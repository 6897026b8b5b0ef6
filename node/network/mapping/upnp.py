"""UPnP's Internet Gateway Device, by miniupnpc: for routers without NAT-PMP.

The library blocks for a second while it searches, so all of it runs in a thread.  Every device of the local
network may answer the search, and its answers are read by the library, which is written in C.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import trio

from node.network.mapping.default_route import is_offline
from node.network.mapping.plan import NO_ROUTER, Ask, Forwarding, MappingError
from node.runtime.console import one_line

SEARCH_MILLISECONDS = 1000  # routers are to answer at a random moment within it
OTHER_PORTS = range(20_000, 60_000)  # where the wanted port is another machine's
OTHER_TRIES = 3
NAME = "Raceme"  # in the router's own list
_NO_ROUTER = "Success"  # what the library raises where no device answers: an errno of 0
_ONLY_WITHOUT_END = "OnlyPermanentLeasesSupported"  # error 725, said by the library in this word
_MAX_REASON_CHARACTERS = 100

T = TypeVar("T")


class Device(Protocol):
    """The part of miniupnpc's `UPnP` that is used; all of it blocks and raises `Exception`."""

    discoverdelay: int

    @property
    def lanaddr(self) -> str:
        """This machine's address on the way to the router."""

    def discover(self) -> int:
        """Search; the number of devices."""

    def selectigd(self) -> str:
        """Choose the router among the devices."""

    def externalipaddress(self) -> str:
        """The router's own address on its outer side."""

    def getspecificportmapping(self, port: int, protocol: str) -> tuple[Any, ...] | None:
        """(host, inner port, description, enabled, lease) of a forwarded port; None for a free one."""

    def addportmapping(
        self, outside_port: int, protocol: str, host: str, port: int, name: str, remote: str, lease: int, /
    ) -> bool:
        """Have a port forwarded."""

    def deleteportmapping(self, port: int, protocol: str) -> bool:
        """Have a port forgotten."""


def _miniupnpc() -> Device:
    import miniupnpc

    device: Device = miniupnpc.UPnP()
    return device


class Upnp:
    """Asks a router that a search has found.  Only one call runs at a time.

    make: a new `Device`, which has found nothing yet.  offline: there is no way to any router: a search would
    write the system's errors to standard error, past our log.
    """

    def __init__(
        self,
        make: Callable[[], Device] = _miniupnpc,
        rng: random.Random | None = None,
        offline: Callable[[], bool] = is_offline,
    ) -> None:
        self._make = make
        self._offline = offline
        self._rng = rng or random.Random()
        self._device: Device | None = None  # used by one thread at a time
        self._one = trio.CapacityLimiter(1)

    async def forward(self, ask: Ask) -> Forwarding:
        """Have a port forwarded; searches anew each time, as the router may be another.  Raises MappingError.

        A call that is cancelled ends in its thread, and may leave a port open until its lease is over.
        """
        return await trio.to_thread.run_sync(self._forward, ask, limiter=self._one, abandon_on_cancel=True)

    async def release(self, forwarding: Forwarding) -> None:
        """Have a port forgotten.  Raises MappingError."""
        await trio.to_thread.run_sync(self._release, forwarding, limiter=self._one, abandon_on_cancel=True)

    def _forward(self, ask: Ask) -> Forwarding:
        device = self._device = self._find()
        own = device.lanaddr
        if own not in ask.hosts:
            raise MappingError(f"the way to the router begins at {own}, where this node does not listen")
        said = _call("its address", device.externalipaddress)
        try:
            host = str(ipaddress.IPv4Address(said))
        except ValueError:
            raise MappingError(
                f"the router's own address is {_short(said)}, which is no IPv4 address"
            ) from None
        outside, is_ours = self._free_port(device, ask)
        lease = self._lease(device, ask, outside, is_ours=is_ours)
        return Forwarding("upnp", ask.port, host, outside, lease)

    def _lease(self, device: Device, ask: Ask, outside: int, *, is_ours: bool) -> int:
        """Have a port forwarded; the seconds of its lease, 0 without an end.  Raises MappingError.

        is_ours: it leads to this node already.
        """
        lease = ask.lease_seconds
        while True:
            try:
                self._add(device, ask, outside, lease)
            except MappingError as error:
                if lease and _ONLY_WITHOUT_END in str(error):
                    lease = 0
                elif is_ours:  # some routers renew nothing that they have
                    is_ours = False
                    _call("the end of a lease", device.deleteportmapping, outside, "TCP")
                else:
                    raise
            else:
                return lease

    def _find(self) -> Device:
        if self._offline():
            raise MappingError(NO_ROUTER)
        device = self._make()
        device.discoverdelay = SEARCH_MILLISECONDS
        if not _call("a search", device.discover):
            raise MappingError("no router speaks UPnP")
        _call("a choice of the router", device.selectigd)
        return device

    def _free_port(self, device: Device, ask: Ask) -> tuple[int, bool]:
        """The wanted port, or another where it is another machine's; whether it leads to this node already.

        Raises MappingError.
        """
        others = [self._rng.choice(OTHER_PORTS) for _ in range(OTHER_TRIES)]
        for port in (ask.outside_port, *others):
            try:
                holder = _call("a look at a port", device.getspecificportmapping, port, "TCP")
            except MappingError:
                holder = None  # some routers have an error for a free port
            is_ours = holder is not None and tuple(holder[:2]) == (device.lanaddr, ask.port)
            if holder is None or is_ours:
                return port, is_ours
        raise MappingError(f"the router's port {ask.outside_port} and {OTHER_TRIES} others are taken")

    def _add(self, device: Device, ask: Ask, outside: int, lease: int) -> None:
        added = _call(
            f"port {outside}", device.addportmapping,
            outside, "TCP", device.lanaddr, ask.port, NAME, "", lease,
        )  # fmt: skip
        if not added:
            raise MappingError(f"the router did not forward port {outside}")

    def _release(self, forwarding: Forwarding) -> None:
        if self._device is not None:
            port = forwarding.outside_port
            _call(f"the end of port {port}", self._device.deleteportmapping, port, "TCP")


def _call(what: str, function: Callable[..., T], *arguments: object) -> T:
    """Call the library.  Raises MappingError with its own reason."""
    try:
        return function(*arguments)
    except Exception as error:  # noqa: BLE001  the library raises nothing narrower
        if str(error) == _NO_ROUTER:
            raise MappingError("no router speaks UPnP") from None
        raise MappingError(f"UPnP, {what}: {_short(error)}") from None


def _short(said: object) -> str:
    """A stranger's words, short and harmless on a terminal."""
    return one_line(str(said)[:_MAX_REASON_CHARACTERS])
