"""Attacks on the way in: sockets, handshakes, connections."""

from __future__ import annotations

from functools import partial

import trio

from node.network.transport.multistream import proposal
from node.network.transport.noise import PROTOCOL
from tensor_codec.errors import PeerGone
from tests.hostile.means import channel_to, connection_to, socket_to
from tests.hostile.stage import Stage

FLOOD_SOCKETS, HALF_OPEN, DRIPPING, IDLE, CHURNING = 500, 64, 40, 100, 4
MOST_OPENED = 20_000  # of one attack
FIRST_BYTES = proposal(PROTOCOL)


async def connection_flood(stage: Stage) -> None:
    """500 sockets at a time, each with the first half of a handshake."""
    await stage.ready()
    await stage.at_once(FLOOD_SOCKETS, partial(half_a_handshake, stage, FIRST_BYTES[: len(FIRST_BYTES) // 2]))


async def half_handshakes(stage: Stage) -> None:
    """64 sockets that agree on Noise and then say nothing."""
    await stage.ready()
    await stage.at_once(HALF_OPEN, partial(half_a_handshake, stage, FIRST_BYTES))


async def byte_a_second(stage: Stage) -> None:
    """40 sockets that send a byte a second of the handshake."""
    await stage.ready()
    await stage.at_once(DRIPPING, partial(drip, stage))


async def idle_connections(stage: Stage) -> None:
    """100 finished handshakes of throw-away ids, and then silence."""
    await stage.ready()
    await stage.at_once(IDLE, partial(stay, stage))


async def id_churn(stage: Stage) -> None:
    """A new id for each connection, as fast as handshakes go."""
    await stage.ready()
    await stage.at_once(CHURNING, partial(come_and_go, stage))


async def half_a_handshake(stage: Stage, first: bytes) -> None:
    """One socket, until the node closes it."""
    async with await opened(stage) as stream:
        await stream.send_all(first)
        stage.got["sockets"] += 1
        while await stream.receive_some():
            pass


async def drip(stage: Stage) -> None:
    """One socket with a byte a second."""
    async with await opened(stage) as stream:
        stage.got["sockets"] += 1
        for at in range(len(FIRST_BYTES)):
            await stream.send_all(FIRST_BYTES[at : at + 1])
            with trio.move_on_after(1.0):
                if not await stream.receive_some():
                    return


async def stay(stage: Stage) -> None:
    """One connection that is open and asks for nothing."""
    async with connection_to(stage) as connection:
        stage.got["connections"] += 1
        await connection.closed.wait()
        raise PeerGone(connection.failure or "closed")


async def come_and_go(stage: Stage) -> None:
    """One connection that ends as soon as it is there."""
    channel = await channel_to(stage)
    stage.got["connections"] += 1
    channel.link.close()


async def opened(stage: Stage) -> trio.SocketStream:
    """A socket, or none any more after so many.  Raises OSError."""
    if stage.got["opened"] >= MOST_OPENED:
        await trio.sleep_forever()
    stage.got["opened"] += 1
    return await socket_to(stage)
