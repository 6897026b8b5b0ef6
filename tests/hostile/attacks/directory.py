"""Attacks on what peers know of each other: records, servers that are not there, dials to third parties."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import trio

from node.network.directory.neighbours import PROTOCOL as RECORDS_PROTOCOL
from node.network.transport.identity import Identity
from routing.names import PeerId
from routing.view.exchange import encode_records
from routing.view.records import MAX_TTL_SECONDS, Record, Role, sign_record
from routing.view.view import Arrival
from tensor_codec.messages.info import PeerInfo
from tensor_codec.messages.session import Relink, encode_relink
from tests.hostile.attacks.sessions import session, take_frames
from tests.hostile.judgement import SEEN_SECONDS
from tests.hostile.means import connection_to, framed
from tests.hostile.stage import Stage, new_identity, opening, served_by, spec_of

RECORDS, SYBILS = 10_500, 10_000
FLOODERS = 4
THIRD_PORTS = 8
MOST_DIALS_PER_SECOND = 4.0  # a newcomer a second dials two ports of a server that it has just heard of
SEARCH_MS = 50.0


async def record_flood(stage: Stage) -> None:
    """10,500 records of own keys, over and over, with the longest life that is allowed."""
    info = await served_by(stage.target)
    rng = random.Random(1)
    wires = [forged(info, stage.third, number, rng) for number in range(RECORDS)]
    await stage.ready()
    await spread(stage, wires)


async def sybil_servers(stage: Stage) -> None:
    """10,000 forged servers of many spans that take a connection and answer nothing."""
    info = await served_by(stage.target)
    rng = random.Random(2)
    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(
            partial(trio.serve_tcp, partial(swallow, stage), 0, host=stage.sources[0])
        )
        port = listeners[0].socket.getsockname()[1]
        where = (f"/ip4/{stage.sources[0]}/tcp/{port}",)
        wires = []
        for number in range(SYBILS):
            start = rng.randrange(info.blocks)
            stop = rng.randrange(start, info.blocks) + 1
            wires.append(forged_server(info, new_identity(), number, where, (start, stop)))
        await stage.ready()
        await spread(stage, wires)


async def dial_amplification(stage: Stage) -> None:
    """A session whose successor changes with every order; its addresses are a third party's."""
    info = await served_by(stage.target)
    async with trio.open_nursery() as nursery:
        where = []
        for _ in range(THIRD_PORTS):
            (listener,) = await nursery.start(
                partial(trio.serve_tcp, partial(count_dial, stage), 0, host=stage.third)
            )
            where.append(f"/ip4/{stage.third}/tcp/{listener.socket.getsockname()[1]}")
        victims = [new_identity(), new_identity()]
        wires = [
            forged_server(info, victim, number, tuple(where), (0, info.blocks))
            for number, victim in enumerate(victims)
        ]
        await stage.ready()
        nursery.start_soon(spread, stage, wires)
        await trio.sleep(1.0)
        await stage.again_and_again(partial(relink_forever, stage, info, [each.peer_id for each in victims]))


def few_dials(got: Mapping[str, Any]) -> list[str]:
    """What is wrong with the dials that a third party got."""
    each = got.get("dials", 0) / max(got.get("seconds", 0.0), 1.0)
    if each <= MOST_DIALS_PER_SECOND:
        return []
    return [f"the node dialled a third party {each:.0f} times a second"]


async def relink_forever(stage: Stage, info: PeerInfo, successors: Sequence[PeerId]) -> None:
    """One session that is given the one successor and the other in turn."""
    async with connection_to(stage) as connection, trio.open_nursery() as nursery:
        wanted = opening(spec_of(info), 64, successor=successors[0])
        stream, _ = await session(stage, connection, wanted)
        nursery.start_soon(take_frames, stream)
        for epoch in range(1, 1_000_000):
            await stream.send(encode_relink(Relink(epoch, None, successors[epoch % 2])))
            stage.got["orders"] += 1
            await trio.sleep(0.005)


async def spread(stage: Stage, wires: Sequence[bytes]) -> None:
    """Send records from a few ids, each its part of them, again and again."""
    parts = [wires[number::FLOODERS] for number in range(FLOODERS)]
    identities = [new_identity() for _ in range(FLOODERS)]

    async def one_id(number: int) -> None:
        async with connection_to(stage, identities[number]) as connection, trio.open_nursery() as nursery:
            stream = framed(connection, RECORDS_PROTOCOL)
            nursery.start_soon(take_frames, stream)
            while True:
                for frame in encode_records(Arrival(Record(), wire) for wire in parts[number]):
                    await stream.send(frame)
                stage.got["records"] += len(parts[number])
                await trio.sleep(0.5)

    async with trio.open_nursery() as nursery:
        for number in range(FLOODERS):
            nursery.start_soon(stage.again_and_again, partial(one_id, number))


def forged(info: PeerInfo, third: str, number: int, rng: random.Random) -> bytes:
    """The record of a peer that is not there: a client, a bootstrap node, or a server of all blocks."""
    identity = new_identity()
    where = (f"/ip4/{third}/tcp/{rng.randrange(1024, 65535)}",)
    if number % 3 == 0:
        return forged_server(info, identity, number, where, (0, info.blocks))
    role: Role = "client" if number % 3 == 1 else "bootstrap"
    record = Record(
        peer=identity.peer_id, role=role, addresses=where, seq=number + 1, ttl_seconds=MAX_TTL_SECONDS
    )
    return sign_record(record, identity.private_key)


def forged_server(
    info: PeerInfo, identity: Identity, number: int, where: tuple[str, ...], span: tuple[int, int]
) -> bytes:
    """The record of a fast server that serves nothing."""
    record = server_record(info, identity, where, span)
    return sign_record(replace(record, seq=number + 1, ttl_seconds=MAX_TTL_SECONDS), identity.private_key)


def server_record(
    info: PeerInfo, identity: Identity, where: tuple[str, ...], span: tuple[int, int]
) -> Record:
    """A server of that model, three times as fast as the honest one and with much room."""
    return Record(
        peer=identity.peer_id,
        role="serve",
        addresses=where,
        model=info.model,
        revision=info.revision,
        blocks=info.blocks,
        start=span[0],
        stop=span[1],
        dtype=info.dtype,
        quantize=info.quantize,
        seconds_per_block=max(info.seconds_per_block / 3, 1e-6),
        prefill_seconds_per_token=max(info.prefill_seconds_per_token / 3, 1e-6),
        cache_tokens=info.cache_size,
        session_tokens=info.session_tokens,
        step_tokens=info.step_tokens,
    )


async def count_dial(stage: Stage, stream: trio.SocketStream) -> None:
    """A third party that is dialled and does not know why."""
    stage.got["dials"] += 1
    await stream.aclose()


async def swallow(stage: Stage, stream: trio.SocketStream) -> None:
    """Take a connection and say nothing."""
    stage.got["connections taken"] += 1
    while await stream.receive_some():
        pass


def seen_by_all(got: Mapping[str, Any]) -> list[str]:
    """What is wrong with how fast others see a new record."""
    seen = got.get("announced_seen")
    if seen is None or seen >= 1.0:
        return []
    return [f"of the new records {seen} were seen within {SEEN_SECONDS:g} s"]


def found_fast(got: Mapping[str, Any]) -> list[str]:
    """What is wrong with the honest client's search."""
    most = got.get("search_ms")
    if most is None or most <= SEARCH_MS:
        return []
    return [f"the honest client's search took {most} ms"]
