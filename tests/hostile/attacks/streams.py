"""Attacks on yamux: streams that are held or flooded, windows, pings, control frames, stray bytes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

import trio

from node.network.transport.yamux import DATA, PING, RST, SYN, WINDOW_UPDATE
from tensor_codec.errors import PeerGone
from tensor_codec.limits import KIB, MIB
from tensor_codec.messages.session import PUSH_PROTOCOL
from tests.hostile.means import RawMux, connection_to, raw_mux, stream_of
from tests.hostile.stage import Stage

HOLDERS, HELD_STREAMS = 7, 80
FLOODERS = 4
BATCH = 500  # control frames in one write
STRAY = bytes(60 * KIB)
MOST_BYTES = 16 * 1024 * MIB  # of one attack; it ends by its time long before


async def stream_hold(stage: Stage) -> None:
    """7 throw-away ids that each hold 80 push streams open and send nothing on them."""
    await stage.ready()
    await stage.at_once(HOLDERS, partial(hold, stage))


async def stream_flood(stage: Stage) -> None:
    """Streams opened at full speed, with a new id as soon as one is banned."""
    await flood(stage, lambda mux: opens(mux, resets=False))


async def open_and_reset(stage: Stage) -> None:
    """Streams opened and reset at once at full speed (CVE-2023-44487)."""
    await flood(stage, lambda mux: opens(mux, resets=True))


async def window_violation(stage: Stage) -> None:
    """64 MiB on one stream, without waiting for its window."""
    await flood(stage, too_much)


async def ping_flood(stage: Stage) -> None:
    """Yamux pings at full speed; the answers are not taken."""
    await flood(stage, lambda mux: mux.frames(*[(PING, SYN, 0, 7, b"")] * BATCH))


async def pong_flood(stage: Stage) -> None:
    """Answers to pings that nobody sent."""
    await flood(stage, lambda mux: mux.frames(*[(PING, 2, 0, 7, b"")] * BATCH))


async def control_flood(stage: Stage) -> None:
    """Empty window updates at full speed on a stream that was reset."""

    async def updates(mux: RawMux) -> None:
        stream = mux.new_id()
        await mux.frames((WINDOW_UPDATE, SYN, stream, 0, b""), (WINDOW_UPDATE, RST, stream, 0, b""))
        while True:
            await mux.frames(*[(WINDOW_UPDATE, 0, stream, 0, b"")] * BATCH)
            stage.got["frames"] += BATCH
            await trio.lowlevel.checkpoint()

    await flood(stage, updates)


async def stray_bytes(stage: Stage) -> None:
    """Bytes at full speed for a stream that was reset."""

    async def bytes_for_nobody(mux: RawMux) -> None:
        stream = mux.new_id()
        await mux.frames((WINDOW_UPDATE, SYN, stream, 0, b""), (WINDOW_UPDATE, RST, stream, 0, b""))
        while stage.got["bytes"] < MOST_BYTES:
            await mux.frames((DATA, 0, stream, len(STRAY), STRAY))
            stage.got["bytes"] += len(STRAY)
            await trio.lowlevel.checkpoint()
        await trio.sleep_forever()

    await flood(stage, bytes_for_nobody)


async def hold(stage: Stage) -> None:
    """One id with as many streams as it gets."""
    async with connection_to(stage) as connection:
        held = 0
        while held < HELD_STREAMS:
            stream_of(connection, PUSH_PROTOCOL)
            held += 1
            stage.got["streams"] += 1
            if held > 60:  # within the rate that is allowed
                await trio.sleep(0.06)
        await connection.closed.wait()
        raise PeerGone(connection.failure or "closed")


async def flood(stage: Stage, act: Callable[[RawMux], Awaitable[None]]) -> None:
    """Repeat an act on a few connections, each with a new id as soon as the old one is banned."""
    await stage.ready()

    async def one_id() -> None:
        async with raw_mux(stage) as mux:
            stage.got["connections"] += 1
            while True:
                await act(mux)
                stage.got["acts"] += 1
                await trio.lowlevel.checkpoint()

    await stage.at_once(FLOODERS, one_id)


async def opens(mux: RawMux, *, resets: bool) -> None:
    """A batch of opened streams."""
    frames = []
    for _ in range(BATCH // 5):
        stream = mux.new_id()
        frames.append((WINDOW_UPDATE, SYN, stream, 0, b""))
        if resets:
            frames.append((WINDOW_UPDATE, RST, stream, 0, b""))
    await mux.frames(*frames)


async def too_much(mux: RawMux) -> None:
    """A stream with bytes far beyond its window."""
    stream = mux.new_id()
    await mux.frames((WINDOW_UPDATE, SYN, stream, 0, b""))
    for _ in range(64 * MIB // len(STRAY)):
        await mux.frames((DATA, 0, stream, len(STRAY), STRAY))
