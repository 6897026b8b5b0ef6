"""Hosts on loopback with relays between them, ours and py-libp2p's."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import trio
from libp2p.identity.identify.pb.identify_pb2 import Identify
from libp2p.relay.circuit_v2.protocol import CircuitV2Protocol
from libp2p.tools.anyio_service import background_trio_service

from client.generation.conversation import Conversation
from client.session import hop_link, route
from node.config import ConfigError
from node.network.addresses import Address
from node.network.dialling.from_port import OwnPorts, PortTaken, open_tcp_from
from node.network.host import Host, open_host
from node.network.reachability.asking import Questions, ask_for_reach
from node.network.reachability.candidates import FAMILIES
from node.network.reachability.listener import ReachListener
from node.network.relaying import circuits
from node.network.relaying.circuits import RelayAt, Routes
from node.network.relaying.messages import read_delimited
from node.network.relaying.own_reservations import Candidate
from node.network.relaying.service import CircuitsInUse, Relaying, open_relaying
from node.network.streams import FramedStream
from node.network.transport.identity import load_or_create_identity
from routing.names import PeerId
from tensor_codec.errors import PeerGone
from tensor_codec.limits import Limits
from tensor_codec.messages.reach import REACH_PROTOCOL
from tensor_codec.messages.session import PUSH_PROTOCOL, SESSION_PROTOCOL
from tests.fakes_serving import World, continued, conversation_of, generated, serve_push

ECHO = "/raceme/test-echo/1"
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
PATIENT_SECONDS = 30.0
LATE = Limits(
    dial_seconds=90.0,
    handshake_seconds=90.0,
    negotiation_seconds=90.0,
    libp2p_stream_seconds=90.0,
    circuit_open_seconds=90.0,
    max_libp2p_bytes_per_stream=1 << 30,
)


async def echo(stream: FramedStream) -> None:
    while (frame := await stream.receive()) is not None:
        await stream.send(frame)


@asynccontextmanager
async def peer(
    reservations: int = 0, listen: tuple[str, ...] = (LOOPBACK,), limits: Limits = LATE
) -> AsyncIterator[tuple[Host, Relaying]]:
    identity = load_or_create_identity(None)
    async with (
        open_host(identity=identity, listen=listen, limits=limits) as host,
        open_relaying(host, reservations=reservations) as relaying,
    ):
        host.handle(ECHO, echo)
        yield host, relaying


async def eventually(condition: Callable[[], Any]) -> None:
    with trio.fail_after(PATIENT_SECONDS):
        while not condition():  # noqa: ASYNC110  # what is waited for happens behind a socket
            await trio.sleep(0.01)


def relayed_by(relaying: Relaying, relay: Host) -> None:
    """Let a host keep a reservation there."""
    relaying.keeper.candidates = lambda: [Candidate(relay.peer_id, relay.addresses)]
    relaying.keeper.wanted = lambda: True


def way(relay: Host, *, at_once: bool = True) -> Routes:
    return Routes((RelayAt(relay.peer_id, relay.addresses),), at_once)


def be_patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no reason to give a hop up."""
    monkeypatch.setattr(hop_link, "ATTACH_SECONDS", PATIENT_SECONDS)
    monkeypatch.setattr(route, "RELINK_SECONDS", PATIENT_SECONDS)


def session_over_hosts(nursery: trio.Nursery, client: Host, server: Host) -> tuple[World, Conversation]:
    """A client's tokens from three blocks of a server; the blocks compute with small integers."""
    world = World(nursery)
    node = world.add(server.peer_id, 0, 3)
    server.handle(SESSION_PROTOCOL, node.listener.serve_session)
    server.handle(PUSH_PROTOCOL, lambda stream: serve_push(node.listener, stream, world.frames))

    async def dial(whom: PeerId, addresses: Sequence[str], protocol: str) -> FramedStream:
        return await client.open_stream(whom, (), protocol, seconds=PATIENT_SECONDS)

    return world, conversation_of(world, replace(world.routes(), dial=dial))


async def asked(client: Host, server: Host, addresses: tuple[str, ...] = ()) -> None:
    stream = await client.open_stream(server.peer_id, addresses, ECHO, seconds=PATIENT_SECONDS)
    await stream.send(b"x" * 300_000)
    assert await stream.receive(PATIENT_SECONDS) == b"x" * 300_000
    await stream.aclose()


async def test_a_node_without_an_address_is_reached_through_a_relay():
    async with peer(8) as (relay, carrying), peer() as (server, served), peer(listen=()) as (client, _):
        told: list[tuple[str, ...]] = []
        served.keeper.on_change = told.append
        relayed_by(served, relay)
        await eventually(lambda: told == [(relay.peer_id,)])
        with pytest.raises(PeerGone):
            await client.connect(server.peer_id, [], seconds=1)
        client.dialler.circuits.routes_to = lambda _: way(relay)
        await asked(client, server)
        live = client.connections.live(server.peer_id)
        assert live is not None
        assert live.relayed_by == relay.peer_id
        assert carrying.relayed_bytes > 600_000
        assert not relay.faults.counts()
        assert not server.faults.counts()


async def test_a_lost_relay_is_noticed_and_asked_again_when_it_is_back():
    async with peer(8) as (relay, _), peer() as (server, served):
        relayed_by(served, relay)
        await eventually(lambda: served.keeper.plan.relays)
        before = served.keeper.plan.held[relay.peer_id]
        for connection in relay.connections.of(server.peer_id):
            await connection.close()
        # another one, long before half of its time is over; in between it may be gone for an instant alone
        await eventually(lambda: served.keeper.plan.held.get(relay.peer_id) not in (None, before))


async def test_a_relay_is_dialled_from_the_port_that_the_node_listens_on():
    async with peer(8) as (relay, _), peer() as (server, served):
        await server.connect(relay.peer_id, relay.addresses, seconds=PATIENT_SECONDS)  # from any port
        relayed_by(served, relay)
        await eventually(lambda: served.keeper.plan.seen_at)
        (seen,) = served.keeper.plan.seen_at
        assert [str(seen)] == list(server.addresses)
        assert not served.keeper.plan.is_symmetric
        assert Questions(server, LATE).met_from_own_port(relay.peer_id)
        assert not Questions(relay, LATE).met_from_own_port(server.peer_id), "it has accepted, not dialled"


async def test_what_a_relay_sees_of_another_port_says_nothing_of_the_listener_s():
    few = replace(LATE, max_connections_per_peer=1)
    async with peer(8) as (relay, _), peer(limits=few) as (server, served):
        await server.connect(relay.peer_id, relay.addresses, seconds=PATIENT_SECONDS)  # from any port
        relayed_by(served, relay)
        await eventually(lambda: served.keeper.plan.relays)
        assert served.keeper.plan.seen_at == ()


async def test_a_question_waits_for_a_dial_under_way_and_takes_its_connection():
    async with peer() as (answers, _), peer() as (asks, _), trio.open_nursery() as nursery:
        dialled = partial(asks.connect, answers.peer_id, answers.addresses, seconds=PATIENT_SECONDS)
        nursery.start_soon(dialled)
        nursery.start_soon(asks.dialler.connect_directly, answers.peer_id, answers.addresses, "ip4")
        await eventually(lambda: not nursery.child_tasks)
        assert len(asks.connections.of(answers.peer_id)) == 1


async def test_a_question_goes_over_a_connection_of_its_family_next_to_others():
    async with peer(listen=(LOOPBACK, "/ip6/::1/tcp/0")) as (answers, _), peer() as (asks, _):
        questions = Questions(asks, LATE)
        answers.handle_bytes(REACH_PROTOCOL, ReachListener(LATE, answers.probe).serve)
        seen = {}
        for kind in FAMILIES:
            assert questions.connected(kind) == set()
            stream = await questions.open_question(answers.peer_id, answers.addresses, kind)
            seen[kind] = (await ask_for_reach(stream, (), LATE)).seen
            assert questions.connected(kind) == {answers.peer_id}
        assert seen == {"ip4": "127.0.0.1", "ip6": "::1"}
        assert len(asks.connections.of(answers.peer_id)) == 2
        await (await questions.open_question(answers.peer_id, (), "ip6")).reset()
        assert len(asks.connections.of(answers.peer_id)) == 2
        theirs, ours = questions.links()
        assert (len(theirs), len(ours)) == (0, 2)
        assert Questions(answers, LATE).links() == ([], []), "loopback is not the Internet"


async def test_an_address_that_answers_is_faster_than_a_relay_and_one_that_does_not_costs_a_moment():
    async with peer(8) as (relay, _), peer() as (server, served), peer() as (client, _):
        relayed_by(served, relay)
        await eventually(lambda: served.keeper.plan.relays)
        client.dialler.circuits.routes_to = lambda _: way(relay, at_once=False)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            await asked(client, server, (f"/ip4/127.0.0.1/tcp/{silent.getsockname()[1]}",))
        assert [each.relayed_by for each in client.connections.of(server.peer_id)] == [relay.peer_id]
        await client.dialler.connect_directly(server.peer_id, server.addresses)
        direct = client.connections.live(server.peer_id, direct=True)
        assert direct is not None
        assert client.connections.live(server.peer_id) is direct, "new streams take the direct way"
        for connection in client.connections.of(server.peer_id):
            await connection.close()
        await eventually(lambda: not client.connections.of(server.peer_id))
        await client.connect(server.peer_id, server.addresses, seconds=PATIENT_SECONDS)
        live = client.connections.live(server.peer_id)
        assert live is not None
        assert live.relayed_by is None


async def test_a_session_leaves_the_relay_for_a_direct_connection_and_comes_back_where_that_dies(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(circuits, "SETTLING_SECONDS", 0.0)
    be_patient(monkeypatch)
    async with (
        peer(8) as (relay, carrying),
        peer() as (server, served),
        peer(listen=()) as (client, _),
        trio.open_nursery() as nursery,
    ):
        relayed_by(served, relay)
        await eventually(lambda: served.keeper.plan.relays)
        client.dialler.circuits.routes_to = lambda _: way(relay)
        world, conversation = session_over_hosts(nursery, client, server)
        found = await continued(conversation, [3, 1, 4], 4)
        began = carrying.relayed_bytes
        assert began > 0
        direct = await client.dialler.connect_directly(server.peer_id, server.addresses)
        found += await continued(conversation, [3, 1, 4, *found], 1)
        moved = carrying.relayed_bytes
        found += await continued(conversation, [3, 1, 4, *found], 40)
        assert carrying.relayed_bytes - moved < 1000, "the end of the old stream, and nothing of the 40 steps"
        await direct.close()
        found += await continued(conversation, [3, 1, 4, *found], 4)
        assert carrying.relayed_bytes > moved + 1000
        assert found == generated([3, 1, 4], 49, 3)
        steps = world.nodes[server.peer_id].span.steps
        assert [position for position, *_ in steps] == [0, *range(3, 51)], "nothing twice"
        assert not server.faults.counts()
        conversation.close()
        nursery.cancel_scope.cancel()


async def test_a_session_on_a_direct_way_that_came_of_a_circuit_outlives_it(monkeypatch: pytest.MonkeyPatch):
    be_patient(monkeypatch)
    async with (
        peer(8) as (relay, carrying),
        peer() as (server, served),
        peer() as (client, _),
        trio.open_nursery() as nursery,
    ):
        relayed_by(served, relay)
        await eventually(lambda: served.keeper.plan.relays)
        client.dialler.circuits.routes_to = lambda _: way(relay)
        served.punching.public_addresses = lambda _: client.addresses
        await client.connect(server.peer_id, (), seconds=PATIENT_SECONDS)
        await eventually(lambda: client.connections.live(server.peer_id, direct=True))  # dialled back
        direct = client.connections.live(server.peer_id, direct=True)
        assert direct is not None
        world, conversation = session_over_hosts(nursery, client, server)
        found = await continued(conversation, [3, 1, 4], 4)
        served.punching.public_addresses = lambda _: ()
        await direct.close()
        began = carrying.relayed_bytes
        found += await continued(conversation, [3, 1, 4, *found], 4)
        assert carrying.relayed_bytes > began
        assert found == generated([3, 1, 4], 8, 3)
        steps = world.nodes[server.peer_id].span.steps
        assert [position for position, *_ in steps] == [0, *range(3, 10)], "nothing twice"
        conversation.close()
        nursery.cancel_scope.cancel()


async def test_identify_names_the_protocol_of_a_relay_and_of_no_other_node():
    async with peer(8) as (relay, _), peer() as (other, _), peer(listen=()) as (client, _):
        for host, relays in ((relay, True), (other, False)):
            await client.connect(host.peer_id, host.addresses, seconds=PATIENT_SECONDS)
            connection = client.connections.live(host.peer_id)
            assert connection is not None
            stream = connection.open()
            stream.propose("/ipfs/id/1.0.0")
            said: Any = Identify()
            said.ParseFromString(await read_delimited(stream.receive_some, 16_384))
            assert ("/libp2p/circuit/relay/0.2.0/hop" in said.protocols) is relays
            assert "/ipfs/id/1.0.0" in said.protocols


async def test_a_circuit_through_py_libp2p_s_relay():
    async with peer() as (relay, _), peer() as (server, served), peer(listen=()) as (client, _):
        protocol = CircuitV2Protocol(relay.raw, allow_hop=True)
        async with background_trio_service(protocol):
            await protocol.event_started.wait()
            relayed_by(served, relay)
            await eventually(lambda: served.keeper.plan.relays)
            client.dialler.circuits.routes_to = lambda _: way(relay)
            await asked(client, server)


async def test_a_port_that_dials_leave_from_is_still_refused_to_a_second_listener():
    async with peer() as (host, _):
        port = host.addresses[0].split("/")[-1]
        with pytest.raises(ConfigError, match="the port is in use"):
            async with peer(listen=(f"/ip4/127.0.0.1/tcp/{port}",)):
                pass


async def test_two_dials_leave_from_one_port_and_a_second_one_to_the_same_address_does_not():
    ports = OwnPorts()
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as two:
        own = ports.of("ip4")
        assert ports.of("ip4") == own
        assert ports.has(own)
        targets = [Address("ip4", "127.0.0.1", each.getsockname()[1]) for each in (one, two)]
        streams = [await open_tcp_from(own, each) for each in targets]
        assert [each.socket.getsockname()[1] for each in streams] == [own, own]
        with pytest.raises(PortTaken):
            await open_tcp_from(own, targets[0])
        for stream in streams:
            await stream.aclose()
    ports.close()


def test_a_circuit_without_a_stream_is_closed_and_sooner_next_to_a_direct_connection():
    class Core:
        streams = 0

    class Fake:
        def __init__(self, peer: str, relay: str | None) -> None:
            self.peer, self.relayed_by, self.core, self.is_established = peer, relay, Core(), True

    beside, alone, direct = Fake("a", "r"), Fake("b", "r"), Fake("a", None)
    idle, every = CircuitsInUse(), [beside, alone, direct]

    def unused(now: float) -> list[Fake]:
        return idle.unused(every, now)  # type: ignore[arg-type, return-value]

    assert unused(0.0) == []
    assert unused(9.0) == []
    assert unused(10.0) == [beside]
    every.remove(beside)
    assert unused(59.0) == []
    alone.core.streams = 1
    assert unused(60.0) == []
    alone.core.streams = 0
    assert unused(61.0) == []
    assert unused(121.0) == [alone]
