"""A dial that reuses nothing, between real hosts on loopback: what it finds at an address."""

from __future__ import annotations

import socket

import trio
import trio.testing

from node.network.addresses import Address, parse_address
from node.network.host import open_host
from node.network.reachability.asking import ask_for_reach
from node.network.reachability.listener import ReachListener
from node.network.transport.identity import load_or_create_identity
from tensor_codec.limits import Limits
from tensor_codec.messages.reach import REACH_PROTOCOL

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
PATIENT = Limits(reach_dial_seconds=30.0, dial_seconds=30.0, frame_start_seconds=30.0)


async def test_a_peer_is_reached_where_it_listens_and_nowhere_else_whatever_connection_there_is() -> None:
    async with (
        open_host(identity=load_or_create_identity(None), listen=[LOOPBACK], limits=PATIENT) as alice,
        open_host(identity=load_or_create_identity(None), listen=[LOOPBACK], limits=PATIENT) as bob,
    ):
        await alice.connect(bob.peer_id, bob.addresses, seconds=30.0)
        at, elsewhere = (parse_address(each.addresses[0]) for each in (bob, alice))
        for _ in range(5):  # more than the faults that ban
            assert await alice.probe(bob.peer_id, at) == "reached"
        with socket.socket() as nobody:
            nobody.bind(("127.0.0.1", 0))
            closed = Address("ip4", "127.0.0.1", nobody.getsockname()[1])
            assert await alice.probe(bob.peer_id, closed) == "refused"
        assert len(alice.connections.of(bob.peer_id)) == 1  # the dial left nothing behind
        await trio.testing.wait_all_tasks_blocked(0.2)
        assert not alice.faults.counts()
        assert not bob.faults.banned()  # that a peer leaves at once is counted, and is no reason for a ban
        assert await bob.probe(bob.peer_id, elsewhere) == "another peer"


async def test_a_member_of_another_swarm_is_another_peer() -> None:
    async with (
        open_host(
            identity=load_or_create_identity(None), listen=[LOOPBACK], swarm_key=b"k" * 32, limits=PATIENT
        ) as alice,
        open_host(identity=load_or_create_identity(None), listen=[LOOPBACK], limits=PATIENT) as bob,
    ):
        assert await alice.probe(bob.peer_id, parse_address(bob.addresses[0])) == "another peer"


async def test_a_question_over_the_network_is_answered_with_the_address_that_is_seen() -> None:
    async with (
        open_host(identity=load_or_create_identity(None), listen=[LOOPBACK], limits=PATIENT) as alice,
        open_host(identity=load_or_create_identity(None), listen=[LOOPBACK], limits=PATIENT) as bob,
    ):
        bob.handle_bytes(REACH_PROTOCOL, ReachListener(PATIENT, bob.probe).serve)
        stream = await alice.open_stream(bob.peer_id, bob.addresses, REACH_PROTOCOL, seconds=30.0)
        with trio.fail_after(60.0):
            told = await ask_for_reach(stream, alice.addresses, PATIENT)
        assert (told.seen, told.outcomes) == (
            "127.0.0.1",
            {},
        )  # loopback says nothing about the way from elsewhere
