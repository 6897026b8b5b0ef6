"""Circuits over three peers in memory: a relay, its target behind NAT, and a source."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
import trio.testing
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, StopMessage

from node.network.relaying.circuit_link import is_limited
from node.network.relaying.circuits import SETTLING_SECONDS
from node.network.relaying.messages import (
    HOP_PROTOCOL,
    STOP_PROTOCOL,
    Status,
    decode_hop_answer,
    decode_stop_status,
    delimited,
    encode_hop_connect,
    encode_reserve,
    encode_stop_connect,
    read_delimited,
)
from node.network.transport.connection import Connection, MuxedStream
from node.network.transport.identity import identity_of
from node.network.transport.yamux import StreamReset
from routing.names import PeerId
from tensor_codec.errors import NotAMember, PeerFault, PeerGone, RemoteProtocolError
from tensor_codec.limits import KIB, MIB, Limits
from tests.fakes import ALICE, BOB
from tests.relay_fixtures import ECHO, Peer, ask, connect, receive_exactly

CAROL = identity_of(bytes(31) + b"c")
RELAY = identity_of(bytes(31) + b"r")
QUICK = Limits(relay_bytes_per_second=1 << 40, relay_burst_bytes=1 << 40)


@asynccontextmanager
async def world(limits: Limits = QUICK, key: bytes | None = None) -> AsyncIterator[tuple[Peer, Peer, Peer]]:
    """Source, relay and target; both are connected to the relay, and the target has a reservation."""
    async with trio.open_nursery() as nursery:
        source, relay, target = (Peer(each, nursery, limits, key) for each in (ALICE, RELAY, BOB))
        await connect(source, relay)
        await connect(target, relay)
        assert (await reserved(target, relay)) == Status.OK
        yield source, relay, target
        nursery.cancel_scope.cancel()


async def status(stream: MuxedStream) -> int:
    return decode_hop_answer(await read_delimited(stream.receive_some, 4096)).status


async def reserved(peer: Peer, relay: Peer) -> int:
    stream = await ask(peer, relay, encode_reserve())
    found = await status(stream)
    await stream.aclose()
    return found


async def through(source: Peer, relay: Peer, target: Peer) -> Connection:
    return await source.circuits.dial(source.to(relay), target.peer_id)


async def opened(circuit: Connection) -> MuxedStream:
    stream = circuit.open()
    stream.propose(ECHO)
    return stream


@pytest.mark.parametrize("key", [None, b"k" * 32])
async def test_bytes_go_both_ways_over_a_circuit_and_both_ends_are_proved(
    autojump_clock: trio.testing.MockClock, key: bytes | None
):
    async with world(key=key) as (source, relay, target):
        circuit = await through(source, relay, target)
        assert (circuit.peer, circuit.relayed_by) == (BOB.peer_id, RELAY.peer_id)
        (inbound,) = target.circuits_in
        assert (inbound.peer, inbound.relayed_by) == (ALICE.peer_id, RELAY.peer_id)
        assert circuit.channel.link.remote is None
        assert inbound.prefix == ""
        payload = bytes(range(256)) * 8000
        stream = await opened(circuit)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, payload)
            assert await receive_exactly(stream, len(payload)) == payload
        await stream.send_eof()
        assert await stream.receive_some(1) == b""
        assert relay.table.carried_bytes > 2 * len(payload)
        assert not source.faults + relay.faults + target.faults


async def test_the_end_of_either_ends_the_circuit_and_its_place(autojump_clock: trio.testing.MockClock):
    async with world() as (source, relay, target):
        circuit = await through(source, relay, target)
        await circuit.close()
        await target.circuits_in[0].closed.wait()
        await trio.sleep(1)
        assert not list(relay.table)
        circuit = await through(source, relay, target)
        target.to(relay).close_now("a crash")
        await circuit.closed.wait()
        await trio.sleep(1)
        assert not list(relay.table)
        with pytest.raises(PeerGone, match="no reservation"):
            await through(source, relay, target)


async def test_a_reservation_names_its_end_and_the_relay_s_addresses(autojump_clock: trio.testing.MockClock):
    async with world() as (_source, relay, target):
        stream = await ask(target, relay, encode_reserve())
        answer = decode_hop_answer(await read_delimited(stream.receive_some, 4096))
        assert answer.expires_at == 1000 + 1800
        assert not answer.is_limited


async def test_a_relay_takes_the_peer_of_the_connection_and_no_other(autojump_clock: trio.testing.MockClock):
    async with world() as (source, relay, _target):
        forged = encode_hop_connect(CAROL.peer_id)[1:].replace(
            b"\x08\x01", b"\x08\x00", 1
        )  # RESERVE, for Carol
        stream = await ask(source, relay, delimited(forged))
        assert await status(stream) == Status.OK
        assert ALICE.peer_id in relay.table
        assert CAROL.peer_id not in relay.table


async def test_circuits_are_refused_with_the_specification_s_words(autojump_clock: trio.testing.MockClock):
    async with world() as (source, relay, target):
        for peer, word in ((CAROL, "no reservation"), (ALICE, "permission denied")):
            with pytest.raises(PeerGone, match=f"refuses: {word}"):
                await source.circuits.dial(source.to(relay), peer.peer_id)
        target.wanted = False
        with pytest.raises(PeerGone, match="refuses: connection failed"):
            await through(source, relay, target)
        assert not list(relay.table)


async def test_a_target_has_sixteen_circuits_and_the_next_one_waits_for_the_end_of_one(
    autojump_clock: trio.testing.MockClock,
):
    limits = replace(QUICK, max_circuits_from_peer=20, max_circuit_handshakes=20)
    async with world(limits) as (source, relay, target):
        relay.prefix = "127.0.0.1/32"  # a public address would have eight of them
        circuits = [await through(source, relay, target) for _ in range(16)]
        stream = await ask(source, relay, encode_hop_connect(target.peer_id))
        assert await status(stream) == Status.RESOURCE_LIMIT_EXCEEDED
        assert len(list(relay.table)) == len(target.circuits_in) == 16
        await circuits.pop().close()
        await trio.sleep(0.1)
        assert (await through(source, relay, target)).is_established


async def test_a_peer_that_opens_circuits_without_end_costs_its_target_few_handshakes(
    autojump_clock: trio.testing.MockClock,
):
    async with world() as (source, relay, target):
        relay.prefix = "8.8.8.8/32"  # at which the relay sees the source
        tried = 0
        while trio.current_time() < 20:
            tried += 1
            with contextlib.suppress(PeerGone):
                await (await through(source, relay, target)).close()
            await trio.sleep(0.05)
        assert tried > 200
        assert len(target.circuits_in) <= QUICK.circuits_per_prefix_burst + 41
        assert not list(relay.table)


async def test_a_banned_peer_comes_through_no_relay_and_costs_no_handshake(
    autojump_clock: trio.testing.MockClock,
):
    async with world() as (source, relay, target):
        target.stop.is_banned = lambda peer: peer == ALICE.peer_id
        for _ in range(3):
            with pytest.raises(PeerGone, match="refuses: connection failed"):
                await through(source, relay, target)
        assert not target.circuits_in
        assert target.stop.handshakes == 0
        assert not list(relay.table)
        target.stop.is_banned = lambda _: False
        assert (await through(source, relay, target)).is_established


async def test_nobody_hops_over_a_circuit(autojump_clock: trio.testing.MockClock):
    async with world() as (source, relay, target):
        circuit = await through(source, relay, target)
        for question in (encode_reserve(), encode_hop_connect(RELAY.peer_id)):
            stream = circuit.open()
            stream.propose("/libp2p/circuit/relay/0.2.0/hop")
            await stream.send_all(question)
            assert await status(stream) == Status.PERMISSION_DENIED
        with pytest.raises(PeerGone, match="itself reached through a relay"):
            await source.circuits.dial(circuit, CAROL.peer_id)


async def test_only_a_relay_that_was_asked_brings_peers_and_few_at_once(
    autojump_clock: trio.testing.MockClock,
):
    limits = QUICK
    async with world(limits) as (_source, relay, target):

        async def brought() -> int:
            stream = await ask(relay, target, encode_stop_connect(ALICE.peer_id), STOP_PROTOCOL)
            return decode_stop_status(await read_delimited(stream.receive_some, 4096))

        answers = [await brought() for _ in range(limits.max_circuit_handshakes + 1)]
        assert answers == [Status.OK] * 8 + [Status.RESOURCE_LIMIT_EXCEEDED]
        await trio.sleep(limits.handshake_seconds)  # none of them said a word
        assert await brought() == Status.OK
        target.wanted = False
        assert await brought() == Status.PERMISSION_DENIED


async def test_a_question_that_is_no_message_is_a_fault_and_so_is_none_within_circuit_open_seconds(
    autojump_clock: trio.testing.MockClock,
):
    async with world() as (source, relay, _target):
        await ask(source, relay, delimited(b"\xff\xff"))
        await ask(source, relay, b"\x05")
        await trio.sleep(4.9)
        assert [type(fault) for _, fault in relay.faults] == [RemoteProtocolError]
        await trio.sleep(0.2)
        assert "no question to the relay within 5 s" in str(relay.faults[1][1])


async def test_a_target_that_says_nothing_costs_circuit_open_seconds(
    autojump_clock: trio.testing.MockClock,
):
    async def silent(*_: object) -> None:
        await trio.sleep_forever()

    async with world() as (source, relay, target):
        target.handlers[STOP_PROTOCOL] = silent
        stream = await ask(source, relay, encode_hop_connect(BOB.peer_id))
        began = trio.current_time()
        assert await status(stream) == Status.CONNECTION_FAILED
        assert trio.current_time() - began == pytest.approx(5.0, abs=0.1)
        assert not list(relay.table)


async def test_a_circuit_without_a_byte_ends_after_circuit_idle_seconds(
    autojump_clock: trio.testing.MockClock,
):
    async with world() as (source, relay, target):
        circuit = await through(source, relay, target)
        for _ in range(3):  # bytes keep it
            await trio.sleep(100)
            stream = await opened(circuit)
            await stream.send_all(b".")
            assert await stream.receive_some() == b"."
        began = trio.current_time()
        await circuit.closed.wait()
        assert trio.current_time() - began == pytest.approx(120.0, abs=5)
        assert not relay.faults


async def raw_circuit(source: Peer, relay: Peer, target: Peer) -> tuple[MuxedStream, MuxedStream]:
    """The streams of a circuit's ends, without a connection in them."""
    arrived: list[MuxedStream] = []
    done = trio.Event()

    async def accept(stream: MuxedStream, *_: object) -> None:
        await read_delimited(stream.receive_some, 4096)
        await stream.send_all(delimited(b"\x08\x01\x20\x64"))  # STATUS, OK
        arrived.append(stream)
        done.set()
        await trio.sleep_forever()

    target.handlers[STOP_PROTOCOL] = accept
    stream = await ask(source, relay, encode_hop_connect(target.peer_id))
    assert await status(stream) == Status.OK
    await done.wait()
    return stream, arrived[0]


async def test_a_slow_target_stops_the_source_and_the_relay_holds_a_window(
    autojump_clock: trio.testing.MockClock,
):
    async with world() as (source, relay, target):
        ours, theirs = await raw_circuit(source, relay, target)
        with trio.move_on_after(60):
            await ours.send_all(bytes(64 * MIB))
        held = sum(each.core.unread_bytes for each in relay.connections)
        assert held <= MIB, "what has no credit yet"
        sent = relay.table.carried_bytes
        assert sent <= 2 * MIB, "the target's own window"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ours.send_all, bytes(4 * MIB))
            await receive_exactly(theirs, 4 * MIB)  # and it goes on
        ours.reset_now()


async def test_one_end_may_end_its_side_and_hear_the_other_out(autojump_clock: trio.testing.MockClock):
    async with world() as (source, relay, target):
        ours, theirs = await raw_circuit(source, relay, target)
        await ours.send_all(b"question")
        await ours.send_eof()
        assert await receive_exactly(theirs, 8) == b"question"
        assert await theirs.receive_some() == b""
        await theirs.send_all(b"answer")
        await theirs.send_eof()
        assert await receive_exactly(ours, 6) == b"answer"
        assert await ours.receive_some() == b""
        await trio.sleep(1)
        assert not list(relay.table)


async def test_all_circuits_together_have_relay_bytes_per_second_and_each_its_part(
    autojump_clock: trio.testing.MockClock,
):
    limits = Limits(relay_bytes_per_second=1 * MIB, relay_burst_bytes=64 * KIB)
    async with world(limits) as (source, relay, target):
        ends = [await raw_circuit(source, relay, target) for _ in range(2)]
        got = [0, 0, 0]

        async def flow(number: int) -> None:
            ours, theirs = ends[number]
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ours.send_all, bytes(64 * MIB))
                while True:
                    got[number] += len(await theirs.receive_some())

        with trio.move_on_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flow, 0)
                nursery.start_soon(flow, 1)
        assert sum(got) == pytest.approx(10 * MIB, rel=0.1)
        assert got[0] == pytest.approx(got[1], rel=0.1)


async def test_a_stranger_has_no_circuit_into_a_private_swarm(autojump_clock: trio.testing.MockClock):
    async with world(key=b"k" * 32) as (source, relay, _target):
        stranger = Peer(CAROL, source.nursery, QUICK, b"o" * 32)
        outcome: list[PeerFault] = []
        try:
            await connect(stranger, relay)
        except* (NotAMember, PeerGone) as group:
            outcome += [each for each in group.exceptions if isinstance(each, PeerFault)]
        assert outcome


async def test_a_faulty_handshake_over_a_circuit_is_not_the_relay_s_fault(
    autojump_clock: trio.testing.MockClock,
):
    async with world() as (source, relay, target):
        stream = await ask(source, relay, encode_hop_connect(BOB.peer_id))
        assert await status(stream) == Status.OK
        await stream.send_all(b"\x05nope\n")
        await trio.sleep(10)
        assert len(target.faults) == 1
        assert not target.circuits_in
        circuit = await through(source, relay, target)
        assert circuit.is_established


async def test_a_session_waits_a_moment_for_a_direct_way_and_no_longer(
    autojump_clock: trio.testing.MockClock,
):
    async with world() as (source, relay, target):
        circuits, began = source.circuits, trio.current_time()
        circuit = await through(source, relay, target)
        assert await circuits.settled(circuit, source.direct) is circuit
        assert trio.current_time() - began == pytest.approx(SETTLING_SECONDS, abs=0.1)
        assert await circuits.settled(circuit, source.direct) is circuit, "it has settled"
        assert trio.current_time() - began < SETTLING_SECONDS + 0.2
        await circuit.close()
        circuit = await through(source, relay, target)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect, target, source)
            began = trio.current_time()
            assert (await circuits.settled(circuit, source.direct)).relayed_by is None
        assert trio.current_time() - began < 0.5


class LimitedRelay:
    """Another program's relay: it says that it ends circuits after so many bytes, and does."""

    def __init__(self, relay: Peer, target: Peer, most: int) -> None:
        self.relay, self.target, self.most = relay, target, most
        relay.handlers[HOP_PROTOCOL] = self.serve

    async def serve(self, stream: MuxedStream, peer: PeerId, prefix: str) -> None:
        await read_delimited(stream.receive_some, 4096)
        asked = StopMessage(type=StopMessage.CONNECT)
        asked.peer.id = ID.from_base58(peer).to_bytes()
        asked.limit.data = self.most
        other = await ask(self.relay, self.target, delimited(asked.SerializeToString()), STOP_PROTOCOL)
        await read_delimited(other.receive_some, 4096)
        answer = HopMessage(type=HopMessage.STATUS)
        answer.status = Status.OK.value  # type: ignore[assignment]  # the stubs want their own enumeration
        answer.limit.data = self.most
        await stream.send_all(delimited(answer.SerializeToString()))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._carry, stream, other)
            await self._carry(other, stream)
            nursery.cancel_scope.cancel()

    async def _carry(self, one: MuxedStream, other: MuxedStream) -> None:
        left = self.most
        with contextlib.suppress(PeerGone):
            while left > 0 and (data := await one.receive_some(left)):
                await other.send_all(data)
                left -= len(data)
        one.reset_now()
        other.reset_now()


async def test_no_session_begins_on_a_circuit_with_a_limit_unless_a_direct_way_comes(
    autojump_clock: trio.testing.MockClock,
):
    async with world() as (source, relay, target):
        LimitedRelay(relay, target, 1 << 20)
        circuit, began = await through(source, relay, target), trio.current_time()
        assert is_limited(circuit)
        assert is_limited(target.circuits_in[0])
        with pytest.raises(PeerGone, match="ends circuits after a while"):
            await source.circuits.settled(circuit, source.direct)
        assert trio.current_time() - began == pytest.approx(QUICK.punch_seconds, abs=0.1)
        await connect(target, source)
        assert (await source.circuits.settled(circuit, source.direct)).relayed_by is None


async def test_a_circuit_that_ends_by_its_limit_is_nobody_s_fault(autojump_clock: trio.testing.MockClock):
    async with world() as (source, relay, target):
        LimitedRelay(relay, target, 100_001)
        circuit = await through(source, relay, target)
        stream = await opened(circuit)
        with contextlib.suppress(PeerGone):
            await stream.send_all(b"x" * 500_000)
        with pytest.raises(PeerGone):
            await receive_exactly(stream, 500_000)
        await trio.sleep(1)
        assert circuit.closed.is_set()
        assert target.circuits_in[0].closed.is_set()
        faults = source.faults + relay.faults + target.faults
        assert {type(fault) for _, fault in faults} <= {PeerGone, StreamReset}, "which bans nobody"


async def test_a_session_waits_no_longer_where_the_punch_has_failed(autojump_clock: trio.testing.MockClock):
    async with world() as (source, relay, target):
        circuit, began = await through(source, relay, target), trio.current_time()
        source.circuits.settles_at.pop(circuit)
        assert await source.circuits.settled(circuit, source.direct) is circuit
        assert trio.current_time() == began
