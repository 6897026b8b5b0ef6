"""Forwarded ports: a router of our own on loopback for NAT-PMP, a fake of miniupnpc's object for UPnP."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from node.network.mapping.mapper import ADDRESSES_SECONDS, open_mapper
from node.network.mapping.nat_pmp import TRIES_SECONDS, NatPmp
from node.network.mapping.plan import (
    FIRST_PAUSE_SECONDS,
    LEASE_SECONDS,
    RENEWAL_SECONDS,
    Ask,
    Forwarding,
    MappingError,
    Method,
)
from node.network.mapping.upnp import OTHER_PORTS, Upnp

LOOPBACK = frozenset({"127.0.0.1"})
PORT = 31330
ASK = Ask("nat-pmp", PORT, LOOPBACK, PORT)
OUTSIDE = "203.0.113.7"


class Router:
    """A router that speaks NAT-PMP, on a UDP socket.

    held: outer ports by inner ports.  deaf: so many packets get lost first.  before: bytes that come before
    each answer.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.sock = sock
        self.held: dict[int, int] = {}
        self.requests: list[bytes] = []
        self.deaf = 0
        self.result = 0
        self.before: list[bytes] = []
        self.taken: set[int] = set()

    @property
    def port(self) -> int:
        return self.sock.getsockname()[1]

    async def run(self) -> None:
        while True:
            request, sender = await self.sock.recvfrom(64)
            self.requests.append(request)
            if self.deaf:
                self.deaf -= 1
                continue
            for junk in self.before:
                await self.sock.sendto(junk, sender)
            await self.sock.sendto(self.answer(request), sender)

    def answer(self, request: bytes) -> bytes:
        head = bytes([0, 128 + request[1]]) + self.result.to_bytes(2, "big") + (7).to_bytes(4, "big")
        if request[1] == 0:
            return head + socket.inet_aton(OUTSIDE)
        inner, outer = int.from_bytes(request[4:6], "big"), int.from_bytes(request[6:8], "big")
        lifetime = int.from_bytes(request[8:12], "big")
        if lifetime == 0:
            self.held.pop(inner, None)
            return head + inner.to_bytes(2, "big") + bytes(6)
        outer += outer in self.taken
        self.held[inner] = outer
        return head + inner.to_bytes(2, "big") + outer.to_bytes(2, "big") + lifetime.to_bytes(4, "big")


@asynccontextmanager
async def open_router() -> AsyncIterator[tuple[Router, NatPmp]]:
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        await sock.bind(("127.0.0.1", 0))
        router = Router(sock)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(router.run)
            yield router, NatPmp(lambda: "127.0.0.1", port=router.port)
            nursery.cancel_scope.cancel()


async def test_two_packets_open_a_port_and_one_closes_it():
    async with open_router() as (router, asking):
        forwarding = await asking.forward(ASK)
        assert forwarding == Forwarding("nat-pmp", PORT, OUTSIDE, PORT, LEASE_SECONDS)
        assert [len(request) for request in router.requests] == [2, 12]
        assert router.held == {PORT: PORT}
        await asking.release(forwarding)
        assert router.held == {}


async def test_the_router_s_choice_of_another_port_is_taken():
    async with open_router() as (router, asking):
        router.taken = {PORT}
        assert (await asking.forward(ASK)).outside_port == PORT + 1


async def test_a_packet_that_gets_lost_is_sent_again():
    async with open_router() as (router, asking):
        router.deaf = 1
        assert (await asking.forward(ASK)).host == OUTSIDE
        assert [len(request) for request in router.requests] == [2, 2, 12]


async def test_bytes_that_answer_nothing_are_passed_over():
    async with open_router() as (router, asking):
        router.before = [b"", b"\0", bytes(12), b"\xff" * 64, bytes([0, 130, 0, 0]) + bytes(12)]
        assert (await asking.forward(ASK)).outside_port == PORT


async def test_a_router_that_refuses_says_why():
    async with open_router() as (router, asking):
        router.result = 2
        with pytest.raises(MappingError, match="the router does not allow it"):
            await asking.forward(ASK)


async def test_a_router_without_nat_pmp_is_given_up_soon(autojump_clock: MockClock):
    with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        await silent.bind(("127.0.0.1", 0))
        asking = NatPmp(lambda: "127.0.0.1", port=silent.getsockname()[1])
        began = trio.current_time()
        with pytest.raises(MappingError, match="speaks no NAT-PMP"):
            await asking.forward(ASK)
        assert trio.current_time() - began == pytest.approx(sum(TRIES_SECONDS))


async def test_no_port_is_opened_for_an_address_on_which_nobody_listens():
    async with open_router() as (router, asking):
        with pytest.raises(MappingError, match=r"begins at 127\.0\.0\.1, where this node does not listen"):
            await asking.forward(ASK._replace(hosts=frozenset({"192.168.1.11"})))
        assert router.requests == []


async def test_a_machine_without_a_router_asks_nobody():
    with pytest.raises(MappingError, match="default route"):
        await NatPmp(lambda: None).forward(ASK)


async def test_upnp_searches_nothing_on_a_machine_without_a_default_route():
    def never() -> Device:
        raise AssertionError

    with pytest.raises(MappingError, match="no default route"):
        await Upnp(never, offline=lambda: True).forward(UPNP_ASK)


# UPnP


class Device:
    """A small working router with miniupnpc's ways: it raises `Exception`, and says "Success" for nobody.

    held: (host, inner port, name, lease) by outer ports.
    """

    discoverdelay = 0
    lanaddr = "127.0.0.1"

    def __init__(self) -> None:
        self.held: dict[int, tuple[str, int, str, int]] = {}
        self.is_there = True
        self.leases = True
        self.own = OUTSIDE

    def discover(self) -> int:
        if not self.is_there:
            raise Exception("Success")
        return 2

    def selectigd(self) -> str:
        return "http://router/control"

    def externalipaddress(self) -> str:
        return self.own

    def getspecificportmapping(self, port: int, protocol: str):
        assert protocol == "TCP"
        if port not in self.held:
            raise Exception("NoSuchEntryInArray")
        host, inner, name, lease = self.held[port]
        return host, inner, name, True, lease

    def addportmapping(
        self, outside: int, protocol: str, host: str, port: int, name: str, remote: str, lease: int
    ) -> bool:
        assert (protocol, remote) == ("TCP", "")
        if outside in self.held and self.held[outside][:2] != (host, port):
            raise Exception("ConflictInMappingEntry")
        if lease and not self.leases:
            raise Exception("OnlyPermanentLeasesSupported")
        self.held[outside] = host, port, name, lease
        return True

    def deleteportmapping(self, port: int, protocol: str) -> bool:
        if port not in self.held:
            raise Exception("NoSuchEntryInArray")
        del self.held[port]
        return True


UPNP_ASK = ASK._replace(method="upnp")


def upnp_of(device: Device) -> Upnp:
    return Upnp(lambda: device, random.Random(1), offline=lambda: False)


async def test_upnp_opens_a_port_under_our_name_and_closes_it():
    device = Device()
    asking = upnp_of(device)
    forwarding = await asking.forward(UPNP_ASK)
    assert forwarding == Forwarding("upnp", PORT, OUTSIDE, PORT, LEASE_SECONDS)
    assert device.held == {PORT: ("127.0.0.1", PORT, "Raceme", LEASE_SECONDS)}
    await asking.forward(UPNP_ASK)  # a renewal of its own
    await asking.release(forwarding)
    assert device.held == {}


async def test_an_exception_with_success_is_no_router():
    device = Device()
    device.is_there = False
    with pytest.raises(MappingError, match=r"^no router speaks UPnP$"):
        await upnp_of(device).forward(UPNP_ASK)


async def test_a_port_of_another_machine_stays_its_own():
    device = Device()
    device.held[PORT] = other = ("192.168.1.77", PORT, "a game", 0)
    forwarding = await upnp_of(device).forward(UPNP_ASK)
    assert forwarding.outside_port in OTHER_PORTS
    assert device.held[PORT] == other


async def test_a_router_that_knows_no_leases_forwards_without_an_end():
    device = Device()
    device.leases = False
    assert (await upnp_of(device).forward(UPNP_ASK)).lease_seconds == 0
    assert device.held[PORT][3] == 0


@pytest.mark.parametrize("leases", [True, False])
async def test_a_router_that_renews_nothing_that_it_has_is_made_to_forget_it_first(leases: bool):
    class Stubborn(Device):
        def addportmapping(self, outside: int, *words: Any) -> bool:
            if outside in self.held:
                raise Exception("ConflictInMappingEntry")
            return super().addportmapping(outside, *words)

    device = Stubborn()
    device.leases = leases
    asking = upnp_of(device)
    first = await asking.forward(UPNP_ASK)
    assert await asking.forward(UPNP_ASK) == first
    assert device.held == {PORT: ("127.0.0.1", PORT, "Raceme", LEASE_SECONDS if leases else 0)}


@pytest.mark.parametrize("said", ["", "203.0.113", "203.0.113.7; rm", "\x1b[2J" * 1000, "2001:db8::1"])
async def test_an_address_that_is_none_is_refused_in_a_short_line(said: str):
    device = Device()
    device.own = said
    with pytest.raises(MappingError, match="which is no IPv4 address") as caught:
        await upnp_of(device).forward(UPNP_ASK)
    assert len(str(caught.value)) < 1000
    assert "\x1b" not in str(caught.value)
    assert device.held == {}


async def test_upnp_opens_no_port_for_an_address_on_which_nobody_listens():
    device = Device()
    with pytest.raises(MappingError, match="does not listen"):
        await upnp_of(device).forward(UPNP_ASK._replace(hosts=frozenset({"192.168.1.11"})))
    assert device.held == {}


# The mapper


class Gateway:
    """Forwards what it is asked for, unless `why` says why not; `held` are the outer ports."""

    def __init__(self, why: str | None = None, *, host: str = OUTSIDE, seconds: float = 0.0) -> None:
        self.why = why
        self.host = host
        self.seconds = seconds
        self.asked_at: list[float] = []
        self.held: dict[int, int] = {}

    async def forward(self, ask: Ask) -> Forwarding:
        self.asked_at.append(trio.current_time())
        await trio.sleep(self.seconds)
        if self.why is not None:
            raise MappingError(self.why)
        self.held[ask.outside_port] = ask.port
        return Forwarding(ask.method, ask.port, self.host, ask.outside_port, ask.lease_seconds)

    async def release(self, forwarding: Forwarding) -> None:
        await trio.sleep(self.seconds)
        self.held.pop(forwarding.outside_port, None)


class Offers:
    """What the mapper has offered, by origin."""

    def __init__(self) -> None:
        self.now: dict[Method, list[str]] = {}
        self.log: list[tuple[Method, list[str]]] = []

    def take(self, origin: Method, addresses) -> None:
        self.now[origin] = list(addresses)
        self.log.append((origin, list(addresses)))


HOME = ["/ip4/192.168.1.11/tcp/31330"]
FORWARDED = f"/ip4/{OUTSIDE}/tcp/31330"


def gateways(nat_pmp: Gateway, upnp: Gateway):
    found: dict[Method, Gateway] = {"nat-pmp": nat_pmp, "upnp": upnp}
    return found


async def test_a_forwarded_port_is_offered_renewed_and_closed_at_the_end(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "node")
    first, second, found = Gateway(), Gateway(), Offers()
    async with open_mapper(lambda: HOME, found.take, gateways(first, second), peer="me") as mapper:
        await trio.sleep(1)
        assert found.now == {"nat-pmp": [FORWARDED], "upnp": []}
        assert [str(address) for address, _ in mapper.extra] == [FORWARDED]
        await trio.sleep(LEASE_SECONDS)
        every = RENEWAL_SECONDS["nat-pmp"]
        assert [round(at) for at in first.asked_at[:3]] == [0, every, 2 * every]
        assert len(found.log) == 2, "what stays is offered once"
        assert first.held == {31330: 31330}
    assert caplog.messages == [f"the router forwards {FORWARDED}/p2p/me to this node (NAT-PMP)"]
    assert first.held == {}
    assert second.asked_at == []


async def test_upnp_is_asked_where_nat_pmp_is_silent_for_ever(autojump_clock: MockClock):
    first, second, found = Gateway(seconds=1e9), Gateway(), Offers()
    async with open_mapper(lambda: HOME, found.take, gateways(first, second), peer="me"):
        await trio.sleep(60)
        assert found.now == {"nat-pmp": [], "upnp": [FORWARDED]}


async def test_a_home_without_such_a_router_is_told_once_and_asked_rarely(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "node")
    first, second, found = Gateway("no NAT-PMP"), Gateway("no UPnP"), Offers()
    async with open_mapper(lambda: HOME, found.take, gateways(first, second), peer="me"):
        await trio.sleep(6 * 3600)
    assert found.log == []
    assert [text for text in caplog.messages if "no router forwards" in text] == [
        "no router forwards a port to this node: no NAT-PMP; no UPnP"
    ]
    assert len(first.asked_at) < 20


async def test_one_reason_of_both_protocols_is_said_once(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO", "node")
    offline = Gateway("this machine has no default route")
    async with open_mapper(lambda: HOME, Offers().take, gateways(offline, offline), peer="me"):
        await trio.sleep(60)
    assert caplog.messages == ["no router forwards a port to this node: this machine has no default route"]


async def test_a_machine_that_moves_to_another_network_asks_its_router(autojump_clock: MockClock):
    first, found, listening = Gateway(), Offers(), list(HOME)
    async with open_mapper(lambda: listening, found.take, gateways(first, Gateway()), peer="me"):
        await trio.sleep(1)
        first.host, listening[:] = "198.51.100.9", ["/ip4/10.0.0.5/tcp/31330"]
        await trio.sleep(ADDRESSES_SECONDS + 1)
        assert found.now["nat-pmp"] == ["/ip4/198.51.100.9/tcp/31330"]
        listening[:] = ["/ip4/127.0.0.1/tcp/31330"]
        await trio.sleep(ADDRESSES_SECONDS + 1)
        assert found.now["nat-pmp"] == []
        assert first.held == {}


async def test_look_again_asks_at_once(autojump_clock: MockClock):
    first = Gateway("not yet")
    async with open_mapper(lambda: HOME, Offers().take, gateways(first, Gateway("no")), peer="me") as mapper:
        await trio.sleep(1)
        first.why = None
        mapper.look_again()
        await trio.sleep(1)
        assert mapper.extra
        assert first.asked_at[-1] < FIRST_PAUSE_SECONDS


async def test_a_request_that_is_under_way_at_the_end_leaves_no_port_open(autojump_clock: MockClock):
    class Slow(Gateway):
        async def forward(self, ask: Ask) -> Forwarding:
            self.held[ask.outside_port] = ask.port  # the router has the packet
            await trio.sleep_forever()
            raise AssertionError

    slow = Slow()
    async with open_mapper(lambda: HOME, Offers().take, gateways(slow, Gateway()), peer="me"):
        await trio.sleep(1)
        assert slow.held
    assert not slow.held


async def test_a_router_that_is_silent_at_the_end_holds_nobody_up(autojump_clock: MockClock):
    first = Gateway()
    async with open_mapper(lambda: HOME, Offers().take, gateways(first, Gateway()), peer="me"):
        await trio.sleep(1)
        first.seconds = 1e9
        began = trio.current_time()
    assert trio.current_time() - began <= 1.0
