"""Punches over a circuit in memory: two NATs that let a peer in only while its own side dials."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest
import trio
import trio.testing

from node.network.addresses import Address, parse_address
from node.network.relaying.messages import DCUTR_PROTOCOL, Punch, encode_punch
from node.network.relaying.punching import MAX_DIALS, Punching, dialled
from node.network.transport.connection import Connection
from node.network.transport.identity import identity_of
from node.network.transport.link import Link
from routing.names import PeerId
from tensor_codec.errors import PeerGone, RemoteProtocolError
from tensor_codec.limits import Limits
from tests.fakes import ALICE, BOB, memory_link_pair
from tests.relay_fixtures import Peer, ask, connect

LIMITS = Limits()
RELAY = identity_of(bytes(31) + b"r")
AT_ALICE, AT_BOB = parse_address("/ip4/198.18.101.11/tcp/4001"), parse_address("/ip4/198.18.102.11/tcp/4001")


@dataclass
class Nats:
    """Both ends' NATs: a dial succeeds while the other side dials too.  resets: so many dials are reset."""

    opens: bool = True
    resets: int = 0
    waiting: dict[Address, tuple[Link, trio.Event]] = field(default_factory=dict)
    dials: list[tuple[Address, float]] = field(default_factory=list)

    async def dial(self, own: Address, address: Address) -> Link:
        self.dials.append((address, trio.current_time()))
        if self.resets:
            self.resets -= 1
            raise PeerGone("connection refused")
        if not self.opens:
            await trio.sleep_forever()
        if (met := self.waiting.pop(own, None)) is not None:
            met[1].set()
            return met[0]
        near, far = memory_link_pair()
        event = trio.Event()
        self.waiting[address] = (far, event)
        try:
            await event.wait()
        finally:
            self.waiting.pop(address, None)
        return near


@dataclass
class World:
    source: Peer
    target: Peer
    nats: Nats
    punching: dict[str, Punching]
    circuit: Connection  # as the target has it
    reached: list[tuple[PeerId, tuple[str, ...]]] = field(default_factory=list)
    made: list[Connection] = field(default_factory=list)  # by the target

    async def improve(self) -> bool:
        return await self.punching["target"].improve(self.circuit)

    def direct(self) -> tuple[Connection, Connection]:
        """The punched connection, as the source and as the target have it."""
        return self.source.to(self.target), self.target.to(self.source)


@asynccontextmanager
async def world(limits: Limits = LIMITS, *, public: Sequence[str] = ()) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        source, relay, target = (Peer(each, nursery, limits) for each in (ALICE, RELAY, BOB))
        await connect(source, relay)
        await connect(target, relay)
        stream = await ask(target, relay, b"\x02\x08\x00")  # RESERVE
        await stream.receive_some()
        nats, reached = Nats(), list[tuple[PeerId, tuple[str, ...]]]()

        def punching(peer: Peer, own: Address) -> Punching:
            async def seen_at(circuit: Connection) -> Sequence[Address]:
                return (own,)

            async def dial(address: Address) -> Link:
                return await nats.dial(own, address)

            async def dial_directly(whom: PeerId, addresses: Sequence[str]) -> Connection:
                reached.append((whom, tuple(addresses)))
                if "198.18.1" not in addresses[0]:
                    raise PeerGone("silence")
                await connect(peer, source if peer is target else target)
                made = peer.direct(whom)
                assert made is not None
                return made

            def is_direct(whom: PeerId) -> bool:
                return peer.direct(whom) is not None

            made = Punching(limits, peer.upgrade, peer.add, is_direct, seen_at, dial, dial_directly)
            peer.handlers[DCUTR_PROTOCOL] = made.serve
            return made

        both = {"source": punching(source, AT_ALICE), "target": punching(target, AT_BOB)}
        both["target"].public_addresses = lambda _: public
        await source.circuits.dial(source.to(relay), target.peer_id)
        while not target.circuits_in:  # noqa: ASYNC110  # a test's clock jumps
            await trio.sleep(0.01)
        swarm = World(source, target, nats, both, target.circuits_in[0], reached)
        both["target"].on_direct = swarm.made.append
        yield swarm
        nursery.cancel_scope.cancel()


async def test_two_peers_behind_nat_meet_and_the_circuit_s_dialler_is_the_initiator(
    autojump_clock: trio.testing.MockClock,
):
    async with world() as swarm:
        assert await swarm.improve()
        await trio.sleep(0.1)  # the source's end may come later
        of_source, of_target = swarm.direct()
        assert (of_source.peer, of_target.peer) == (BOB.peer_id, ALICE.peer_id)
        assert of_source.is_initiator
        assert not of_target.is_initiator
        assert {address for address, _ in swarm.nats.dials} == {AT_ALICE, AT_BOB}
        assert swarm.punching["target"].done == 1
        assert swarm.made == [of_target], "its sessions may go on over another circuit"
        assert not swarm.source.faults + swarm.target.faults
        await trio.sleep(1)  # the source has the end of it too
        assert await swarm.improve(), "there is a direct way"
        assert len(swarm.nats.dials) == 2
        assert not swarm.punching["source"].under_way | swarm.punching["target"].under_way


async def test_a_dial_that_was_reset_too_early_is_made_again(autojump_clock: trio.testing.MockClock):
    async with world() as swarm:
        swarm.nats.resets = 3
        assert await swarm.improve()
        assert len(swarm.nats.dials) == 5


async def test_where_nobody_is_let_in_the_circuit_stays_and_two_tries_have_punch_seconds_each(
    autojump_clock: trio.testing.MockClock,
):
    async with world() as swarm:
        swarm.nats.opens = False
        began = trio.current_time()
        assert not await swarm.improve()
        assert trio.current_time() - began == pytest.approx(2 * LIMITS.punch_seconds, abs=0.5)
        assert swarm.circuit.is_established
        dials = sorted(at for address, at in swarm.nats.dials if address == AT_ALICE)
        assert len(dials) <= 2 * MAX_DIALS
        assert dials[1] - dials[0] == pytest.approx(LIMITS.punch_dial_seconds + 0.05)


@pytest.mark.parametrize("symmetric", ["source", "target"])
async def test_where_one_is_behind_a_symmetric_nat_both_know_at_once_that_there_is_no_punch(
    autojump_clock: trio.testing.MockClock, symmetric: str
):
    async def nowhere(circuit: Connection) -> Sequence[Address]:
        return ()

    async with world() as swarm:
        swarm.punching[symmetric].seen_at = nowhere
        ended: list[float] = []
        swarm.punching["source"].on_end = lambda circuit: ended.append(trio.current_time())
        began = trio.current_time()
        assert not await swarm.improve()
        await trio.sleep(1)
        assert len(ended) == 1, "the source's sessions wait for nothing"
        assert ended[0] - began < 0.1
        assert swarm.nats.dials == []
        assert not swarm.source.faults + swarm.target.faults


async def test_a_third_party_that_a_peer_names_is_dialled_a_few_times(autojump_clock: trio.testing.MockClock):
    async with world() as swarm:
        swarm.nats.resets = 1000  # nobody there has asked for it
        assert not await swarm.improve()
        for address in (AT_ALICE, AT_BOB):
            assert len([to for to, _ in swarm.nats.dials if to == address]) == 2 * MAX_DIALS
        assert swarm.circuit.is_established


async def test_a_peer_that_listens_in_public_is_dialled_and_nobody_punches(
    autojump_clock: trio.testing.MockClock,
):
    async with world(public=["/ip4/198.18.1.11/tcp/1"]) as swarm:
        assert await swarm.improve()
        assert swarm.reached == [(ALICE.peer_id, ("/ip4/198.18.1.11/tcp/1",))]
        assert swarm.made == [swarm.target.direct(ALICE.peer_id)]
        assert not swarm.nats.dials


async def test_after_a_reversal_that_failed_there_is_a_punch(autojump_clock: trio.testing.MockClock):
    async with world(public=["/ip4/198.18.9.11/tcp/1"]) as swarm:
        assert await swarm.improve()
        assert len(swarm.reached) == 1
        assert swarm.nats.dials


async def test_a_punch_that_is_not_over_our_own_circuit_is_a_fault(autojump_clock: trio.testing.MockClock):
    async with world() as swarm:
        stream = swarm.source.connections[0].open()  # to the relay, which asks for nothing
        stream.reset_now()
        await connect(swarm.target, swarm.source)
        direct = await ask(swarm.target, swarm.source, encode_punch(Punch(False, (AT_BOB,))), DCUTR_PROTOCOL)
        with pytest.raises(PeerGone):
            await direct.receive_some()
        assert [type(fault) for _, fault in swarm.source.faults] == [RemoteProtocolError]
        assert not swarm.nats.dials


async def test_there_are_max_punches_at_once(autojump_clock: trio.testing.MockClock):
    async with world(replace(LIMITS, max_punches=1)) as swarm:
        swarm.nats.opens = False
        target = swarm.punching["target"]
        assert LIMITS.max_punches == 4
        async with trio.open_nursery() as nursery:
            nursery.start_soon(target.improve, swarm.circuit)
            await trio.sleep(0.1)
            assert not await target.improve(swarm.circuit), "one is under way"
            nursery.cancel_scope.cancel()
        assert not target.under_way


def test_of_the_addresses_that_a_peer_names_public_ones_are_dialled_one_of_each_family():
    texts = [
        "/ip4/192.168.1.1/tcp/80",
        "/ip4/127.0.0.1/tcp/22",
        "/ip4/198.18.1.1/tcp/1",
        "/ip4/198.18.1.2/tcp/2",
        "/ip6/2001:db8::1/tcp/3",
    ]
    assert list(map(str, dialled(list(map(parse_address, texts))))) == [texts[2], texts[4]]
