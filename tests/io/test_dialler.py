"""The rules of dials on a clock that jumps: pauses, purposes, addresses that peers have named."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from node.network.addresses import Address, parse_address
from node.network.connection_table import ConnectionTable
from node.network.dialling import dialler as module
from node.network.dialling.backoff import DialPaused
from node.network.dialling.dialler import AGAIN_SECONDS, Dialler
from node.network.dialling.race import STAGGER_SECONDS
from node.network.transport.connection import Connection
from node.runtime.faults import Faults
from routing.names import PeerId, peer_id_of
from tensor_codec.errors import PeerGone, SlowPeer
from tensor_codec.limits import Limits
from tests.fakes_network import FakeHost, FakeNetwork

LIMITS = Limits()
ME = peer_id_of(bytes(32))
ELSEWHERE = "/ip4/8.8.8.8/tcp/1"


def peer(number: int) -> PeerId:
    return FakeHost(FakeNetwork(), number, None, LIMITS).peer_id


class Wire:
    """What TCP does at each host: connects, refuses, or is silent.  dials: when each was made."""

    def __init__(self) -> None:
        self.answering: set[str] = set()
        self.silent: set[str] = set()
        self.dials: list[tuple[str, float]] = []
        self.under_way = self.most = 0

    async def open_tcp(self, address: Address) -> Address:
        self.dials.append((str(address), trio.current_time()))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await trio.sleep(0.01)
            if address.host in self.silent:
                await trio.sleep_forever()
            if address.host not in self.answering:
                raise PeerGone("refused")
            return address
        finally:
            self.under_way -= 1


class Upgrade:
    """A handshake that goes well, but for the first `resets` links to an address."""

    def __init__(self, resets: dict[str, int] | None = None) -> None:
        self.resets = resets or {}

    async def outbound(self, link: Any, peer: PeerId, where: str) -> Any:
        if self.resets.get(where, 0):
            self.resets[where] -= 1
            raise PeerGone("the connection broke: Connection reset by peer")
        return SimpleNamespace(remote=peer, where=where, link=link)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    made = Wire()
    monkeypatch.setattr(module, "open_tcp", made.open_tcp)
    monkeypatch.setattr(module, "SocketLink", lambda stream, seconds: SimpleNamespace(close=lambda: None))
    return made


def dialler_of(
    own: tuple[str, ...] = ("8.8.4.4",), limits: Limits = LIMITS, upgrade: Upgrade | None = None
) -> Dialler:
    async def add(channel: Any) -> Any:
        return channel

    faults = Faults(limits, clock=trio.current_time, prefix_of=lambda _: "", on_ban=lambda _: None)
    handshake: Any = upgrade or Upgrade()
    made = Dialler(ME, limits, handshake, ConnectionTable(limits, faults), add, random.Random(1))
    made.networks.set_own(own, listens=True)
    return made


async def dial(dialler: Dialler, whom: PeerId, *addresses: str, **options: Any) -> Connection | str:
    try:
        return await dialler.connect(whom, addresses, 5.0, **options)
    except (PeerGone, SlowPeer) as fault:
        return str(fault)


async def test_a_peer_that_refuses_is_dialled_a_few_times_a_minute_however_often_it_is_asked_for(
    autojump_clock: trio.testing.MockClock, wire: Wire
):
    dialler = dialler_of()
    while trio.current_time() < 60.0:
        await dial(dialler, peer(1), ELSEWHERE)
        await trio.sleep(0.1)
    assert 5 <= len(wire.dials) <= 12


async def test_after_a_reset_the_next_address_is_tried_at_once(
    autojump_clock: trio.testing.MockClock, wire: Wire
):
    other = "/ip4/9.9.9.9/tcp/1"
    wire.answering |= {"8.8.8.8", "9.9.9.9"}
    dialler = dialler_of(upgrade=Upgrade({ELSEWHERE: 9}))
    made = await dial(dialler, peer(1), ELSEWHERE, other)
    assert not isinstance(made, str)
    assert [address for address, _ in wire.dials] == [ELSEWHERE, other]
    assert trio.current_time() < STAGGER_SECONDS


@pytest.mark.parametrize(("resets", "works"), [(1, True), (2, False)])
async def test_a_peer_that_ends_the_connection_at_once_is_dialled_once_more_after_a_pause(
    autojump_clock: trio.testing.MockClock, wire: Wire, resets: int, works: bool
):
    refused = "/ip4/9.9.9.9/tcp/1"
    wire.answering.add("8.8.8.8")
    dialler = dialler_of(upgrade=Upgrade({ELSEWHERE: resets}))
    dialler.networks.configure([parse_address(ELSEWHERE)])
    made = await dial(dialler, peer(1), ELSEWHERE, refused)
    assert [address for address, _ in wire.dials] == [ELSEWHERE, refused, ELSEWHERE]
    assert wire.dials[2][1] - wire.dials[0][1] >= AGAIN_SECONDS
    assert isinstance(made, str) is not works
    if not works:
        assert "reset by peer" in str(made)
        assert "refused" in str(made), "every address with its reason"


async def test_a_stranger_s_address_that_resets_is_not_dialled_once_more(
    autojump_clock: trio.testing.MockClock, wire: Wire
):
    wire.answering.add("8.8.8.8")
    dialler = dialler_of(upgrade=Upgrade({ELSEWHERE: 1}))
    assert "reset by peer" in str(await dial(dialler, peer(1), ELSEWHERE))
    assert "the next one is made in" in str(await dial(dialler, peer(1), ELSEWHERE))
    assert len(wire.dials) == 1


async def test_two_ports_of_a_host_are_dialled_and_a_third_one_only_where_we_know_it(
    autojump_clock: trio.testing.MockClock, wire: Wire
):
    ports = [f"/ip4/8.8.8.8/tcp/{port}" for port in range(1, 9)]
    dialler = dialler_of()
    dialler.networks.configure([parse_address(ports[5])])
    made = await dial(dialler, peer(1), *ports)
    assert sorted({address for address, _ in wire.dials}) == [ports[0], ports[5]]
    assert f"{ports[1]}: an address too many of its host" in str(made)


async def test_peers_that_name_one_address_make_it_no_oftener_dialled(
    autojump_clock: trio.testing.MockClock, wire: Wire
):
    dialler, number = dialler_of(), 0
    while trio.current_time() < 60.0:
        number += 1
        await dial(dialler, peer(number), ELSEWHERE)
        await trio.sleep(0.1)
    assert number > 300
    assert len(wire.dials) <= 12


async def test_ports_of_one_host_are_dialled_at_a_rate(autojump_clock: trio.testing.MockClock, wire: Wire):
    dialler, number = dialler_of(), 0
    while trio.current_time() < 30.0:
        number += 1
        addresses = [f"/ip4/8.8.8.8/tcp/{8 * number + n}" for n in range(8)]
        await dial(dialler, peer(number), *addresses)
        await trio.sleep(0.05)
    assert len(wire.dials) <= LIMITS.failed_dials_per_host_burst + 31


async def test_punches_to_one_host_have_the_same_rate_and_private_hosts_get_none(
    autojump_clock: trio.testing.MockClock, wire: Wire, monkeypatch: pytest.MonkeyPatch
):
    async def open_tcp_from(_port: int, address: Address) -> Address:
        return await wire.open_tcp(address)

    monkeypatch.setattr(module, "open_tcp_from", open_tcp_from)
    dialler, number = dialler_of(), 0
    while trio.current_time() < 30.0:
        number += 1
        with pytest.raises(PeerGone):
            await dialler.dial_from_own_port(Address("ip4", "8.8.8.8", number))
        await trio.sleep(0.05)
    assert number > 300
    assert len(wire.dials) <= LIMITS.failed_dials_per_host_burst + 31
    before = len(wire.dials)
    with pytest.raises(PeerGone):
        await dialler.dial_from_own_port(Address("ip4", "192.168.1.7", 22))
    assert len(wire.dials) == before
    dialler.ports.close()


async def test_a_dial_that_is_given_up_by_its_caller_counts_as_failed_if_it_took_long(
    autojump_clock: trio.testing.MockClock, wire: Wire
):
    dialler = dialler_of()
    wire.silent.add("8.8.8.8")
    for _ in range(10):
        with trio.move_on_after(1.5):
            await dialler.connect(peer(1), [ELSEWHERE], 5.0)
            raise AssertionError("connected")
        with pytest.raises(PeerGone, match="failed a moment ago"):
            await dialler.connect(peer(2), [ELSEWHERE], 5.0)
        await trio.sleep(dialler.backoff.seconds_left(ELSEWHERE, trio.current_time()))
    assert trio.current_time() > 120.0


async def test_a_peer_is_dialled_again_soon_after_a_sign_of_life(
    autojump_clock: trio.testing.MockClock, wire: Wire
):
    dialler = dialler_of()
    for _ in range(8):
        await dial(dialler, peer(1), ELSEWHERE)
        await trio.sleep(dialler.backoff.seconds_left(peer(1), trio.current_time()))
    await dial(dialler, peer(1), ELSEWHERE)
    wire.answering.add("8.8.8.8")
    await trio.sleep(1.0)
    with pytest.raises(DialPaused):
        await dialler.connect(peer(1), [ELSEWHERE], 5.0)
    dialler.backoff.sign_of_life([peer(1), ELSEWHERE])
    assert not isinstance(await dial(dialler, peer(1), ELSEWHERE), str)


async def test_configured_addresses_have_no_pause(autojump_clock: trio.testing.MockClock, wire: Wire):
    dialler = dialler_of()
    dialler.networks.configure([parse_address(ELSEWHERE)])
    for _ in range(20):
        await dial(dialler, peer(1), ELSEWHERE)
    assert len(wire.dials) == 20


async def test_addresses_of_networks_where_the_node_is_not_are_not_dialled(
    autojump_clock: trio.testing.MockClock, wire: Wire
):
    dialler = dialler_of()
    wire.answering.add("8.8.8.8")
    said = await dial(dialler, peer(1), "/ip4/127.0.0.1/tcp/22", "/ip4/10.0.0.1/tcp/80")
    assert "a peer's loopback address, and this node is not there" in str(said)
    assert "a peer's 10.0.0.0/8 address" in str(said)
    await trio.sleep(2.0)
    assert not isinstance(await dial(dialler, peer(1), "/ip4/127.0.0.1/tcp/22", ELSEWHERE), str)
    assert {address for address, _ in wire.dials} == {ELSEWHERE}


async def test_a_name_that_resolves_to_an_inner_address_is_not_dialled(
    autojump_clock: trio.testing.MockClock, wire: Wire, monkeypatch: pytest.MonkeyPatch
):
    async def resolve(_: Address) -> list[Address]:
        await trio.lowlevel.checkpoint()
        return [parse_address("/ip4/169.254.169.254/tcp/80")]

    monkeypatch.setattr(module, "resolve", resolve)
    said = await dial(dialler_of(), peer(1), "/dns4/metadata.example/tcp/80")
    assert "a peer's link-local address" in str(said)
    assert wire.dials == []


async def test_a_configured_name_that_resolves_to_a_private_address_is_dialled_and_its_network_with_it(
    autojump_clock: trio.testing.MockClock, wire: Wire, monkeypatch: pytest.MonkeyPatch
):
    """A client, which listens nowhere, with the name of a node of its own network: so does a compose file."""

    async def resolve(_: Address) -> list[Address]:
        await trio.lowlevel.checkpoint()
        return [parse_address("/ip4/172.18.0.2/tcp/31330")]

    monkeypatch.setattr(module, "resolve", resolve)
    wire.answering |= {"172.18.0.2", "172.18.0.3"}
    dialler = dialler_of()
    dialler.networks.set_own([], listens=False)
    dialler.networks.configure([parse_address("/dns4/bootstrap/tcp/31330")])
    assert "a peer's 172.16.0.0/12" in str(await dial(dialler, peer(2), "/dns4/stranger/tcp/31330"))
    assert not isinstance(await dial(dialler, peer(1), "/dns4/bootstrap/tcp/31330"), str)
    assert not isinstance(await dial(dialler, peer(2), "/ip4/172.18.0.3/tcp/31330"), str)


async def test_of_a_successor_two_addresses_are_dialled_those_reached_before_first(
    autojump_clock: trio.testing.MockClock, wire: Wire
):
    dialler = dialler_of()
    addresses = [f"/ip4/8.8.8.{n}/tcp/1" for n in range(1, 7)]
    wire.answering.add("8.8.8.6")
    await dial(dialler, peer(1), addresses[5])
    wire.answering.clear()
    wire.dials.clear()
    await dial(dialler, peer(2), *addresses, most_addresses=2)
    assert [address for address, _ in wire.dials] == [addresses[5], addresses[0]]


async def test_silent_peers_that_are_pinged_delay_no_session(
    autojump_clock: trio.testing.MockClock, wire: Wire
):
    dialler = dialler_of()
    wire.silent.update(f"9.9.9.{n}" for n in range(1, 40))
    wire.answering.add("8.8.8.8")
    async with trio.open_nursery() as nursery:
        for number in range(1, 40):
            address = f"/ip4/9.9.9.{number}/tcp/1"
            nursery.start_soon(lambda n=number, a=address: dial(dialler, peer(n), a, purpose="ping"))  # type: ignore[misc]  # a lambda
        await trio.sleep(0.1)
        assert wire.most == LIMITS.max_dials
        began = trio.current_time()
        assert not isinstance(await dial(dialler, peer(50), ELSEWHERE), str)
        assert trio.current_time() - began < 0.1
        nursery.cancel_scope.cancel()
