"""When a dial takes a relay, on a clock that jumps: after the peer's addresses, at once, or not at all."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.testing

from node.network.addresses import Address
from node.network.connection_table import ConnectionTable
from node.network.dialling import dialler as module
from node.network.dialling.dialler import Dialler
from node.network.dialling.race import STAGGER_SECONDS, first_of
from node.network.relaying.circuits import RelayAt, Routes
from node.runtime.faults import Faults
from routing.names import PeerId, peer_id_of
from tensor_codec.errors import NotAMember, PeerFault, PeerGone, SlowPeer
from tensor_codec.limits import Limits

ME, PEER, NEAR, FAR = (peer_id_of(bytes([number]) * 32) for number in range(4))
ELSEWHERE = "/ip4/8.8.8.8/tcp/1"
BOTH = (RelayAt(NEAR, ()), RelayAt(FAR, ()))


@dataclass(eq=False)
class Connected:
    """A connection as the dialler has one."""

    peer: PeerId
    relayed_by: PeerId | None = None
    is_established: bool = True
    is_initiator: bool = True


@dataclass
class Network:
    """The times that ways to the peer take; None: the way fails at once; infinity: silence.

    circuits: when each was asked for, by relay.
    """

    direct_seconds: float | None
    relay_seconds: dict[PeerId, float | None]
    routes: Routes
    asked: list[tuple[PeerId, float]] = field(default_factory=list)

    async def dial(self, relay: Any, peer: PeerId) -> Any:
        self.asked.append((relay.peer, trio.current_time()))
        seconds = self.relay_seconds[relay.peer]
        if seconds is None:
            raise PeerGone(f"relay {relay.peer} refuses: no reservation")
        await trio.sleep(seconds)
        return Connected(peer, relay.peer)

    def routes_to(self, peer: PeerId) -> Routes:
        return self.routes

    async def open_tcp(self, address: Address) -> Address:
        if self.direct_seconds is None:
            raise PeerGone("refused")
        await trio.sleep(self.direct_seconds)
        return address


class Upgrade:
    async def outbound(self, link: Any, peer: PeerId, where: str) -> Any:
        return Connected(peer)


def dialler_of(network: Network, monkeypatch: pytest.MonkeyPatch) -> Dialler:
    async def add(channel: Any) -> Any:
        return channel

    monkeypatch.setattr(module, "open_tcp", network.open_tcp)
    monkeypatch.setattr(module, "SocketLink", lambda stream, seconds: None)
    limits = Limits()
    faults = Faults(limits, clock=trio.current_time, prefix_of=lambda _: "", on_ban=lambda _: None)
    table, handshake = ConnectionTable(limits, faults), Upgrade()
    for relay in (NEAR, FAR):
        connection: Any = Connected(relay)
        table.add(connection, 0.0)
    made = Dialler(ME, limits, handshake, table, add, random.Random(1))  # type: ignore[arg-type]
    made.networks.set_own(("8.8.4.4",), listens=True)
    made.circuits = network  # type: ignore[assignment]
    return made


async def way(dialler: Dialler, *addresses: str) -> tuple[PeerId | None, Any] | str:
    """The relay of the connection that was made, None for a direct one, and the seconds that it took."""
    began = trio.current_time()
    try:
        made = await dialler.connect(PEER, addresses, 5.0)
    except PeerFault as fault:
        return f"{type(fault).__name__}: {fault}"
    return made.relayed_by, pytest.approx(trio.current_time() - began, abs=0.01)


async def test_an_address_that_answers_within_a_quarter_of_a_second_is_taken_without_a_relay(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
):
    network = Network(0.2, {NEAR: 0.0, FAR: 0.0}, Routes(BOTH))
    assert await way(dialler_of(network, monkeypatch), ELSEWHERE) == (None, 0.2)
    assert not network.asked


async def test_addresses_that_are_silent_cost_a_quarter_of_a_second(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
):
    network = Network(60.0, {NEAR: 0.1, FAR: 0.0}, Routes(BOTH))
    found = await way(dialler_of(network, monkeypatch), ELSEWHERE)
    assert found == (NEAR, STAGGER_SECONDS + 0.1)


async def test_addresses_that_refuse_and_relays_that_refuse_cost_nothing(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
):
    network = Network(None, {NEAR: None, FAR: 0.1}, Routes(BOTH))
    assert await way(dialler_of(network, monkeypatch), ELSEWHERE) == (FAR, 0.1)


async def test_a_peer_that_has_only_relays_is_asked_for_there_at_once(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
):
    for addresses in ((), (ELSEWHERE,)):
        network = Network(60.0, {NEAR: 0.1, FAR: 0.0}, Routes(BOTH, at_once=True))
        assert await way(dialler_of(network, monkeypatch), *addresses) == (NEAR, 0.1)


async def test_a_silent_relay_delays_the_next_one_by_a_quarter_of_a_second(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
):
    network = Network(60.0, {NEAR: 60.0, FAR: 0.1}, Routes(BOTH, at_once=True))
    assert await way(dialler_of(network, monkeypatch)) == (FAR, STAGGER_SECONDS + 0.1)


async def test_where_every_way_fails_every_reason_is_told_and_relays_have_a_pause_too(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
):
    network = Network(None, {NEAR: None, FAR: None}, Routes(BOTH))
    dialler = dialler_of(network, monkeypatch)
    said = str(await way(dialler, ELSEWHERE))
    assert said.startswith("PeerGone: ")
    assert "refused" in said
    assert f"relay {NEAR} refuses" in said
    assert f"relay {FAR} refuses" in said
    assert "the next one is made in" in str(await way(dialler))
    assert len(network.asked) == 2


async def test_nobody_is_asked_for_a_circuit_to_itself_or_to_us(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
):
    network = Network(None, {}, Routes((RelayAt(PEER, ()), RelayAt(ME, ())), at_once=True))
    assert "neither an address nor a relay" in str(await way(dialler_of(network, monkeypatch)))


@pytest.mark.parametrize("kind", [NotAMember, SlowPeer])
async def test_of_several_faults_the_operator_reads_the_one_that_matters(
    autojump_clock: trio.testing.MockClock, kind: type[PeerFault]
):
    async def gone() -> int:
        raise PeerGone("gone")

    async def other() -> int:
        raise kind("other")

    with pytest.raises(NotAMember if kind is NotAMember else PeerGone, match="other"):
        await first_of([gone, other], [0.0, 0.0])
